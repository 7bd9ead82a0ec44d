"""Runs a program on an emulated processor with AVX-512: Bochs boots Linux with the program as its first process."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

# Skylake-X: the newest of Bochs 2.7's models whose saved registers Linux accepts (without XSAVEC and XSAVES,
# whose sizes are wrong).
CONFIG = """
display_library: rfb, options="timeout=0"
plugin_ctrl: unmapped=0, speaker=0, gameport=0, parallel=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
megs: 512
cpu: model=corei7_skylake_x, ips=100000000
clock: sync=none
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial
log: log
panic: action=fatal
error: action=ignore
info: action=ignore
"""
BOOT = """
default linux
label linux
kernel linux
append initrd=files console=ttyS0 loglevel=1 mitigations=off clearcpuid=xsavec,xsaves {variables} -- {words}
"""
ISOLINUX = ("/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32")
DEBIAN = "bochs bochsbios vgabios isolinux syslinux-common xorriso"


def missing() -> str:
    """What this needs and the machine has not, for a skip."""
    found = all(map(shutil.which, ("bochs", "xorriso", "apt-get"))) and all(Path(path).exists() for path in ISOLINUX)
    return "" if found else f"no Bochs to emulate AVX-512 (Debian: {DEBIAN})"


def kernel(folder: Path) -> Path | None:
    """Debian's Linux for virtual machines, unpacked but not installed; None where there is no network."""
    depends = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True)
    name = re.search(r"linux-image-\S+-cloud-amd64$", depends.stdout, re.MULTILINE)
    if not name or subprocess.run(["apt-get", "download", "-qq", name[0]], cwd=folder, capture_output=True).returncode:
        return None
    subprocess.run(["dpkg-deb", "-x", next(folder.glob("*.deb")), folder / "linux"], check=True)
    return next((folder / "linux" / "boot").glob("vmlinuz-*"))


def cpio(entries: dict[str, tuple[int, bytes]]) -> bytes:
    """An archive as Linux takes it for its first file system: {path: (mode, content)}."""
    archive = b""
    for number, (path, (mode, content)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))], start=1):
        # The one device is the console, 5:1.
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 5, 1, len(path) + 1, 0]
        for part in ("070701" + "".join(f"{field:08X}" for field in fields)).encode() + path.encode() + b"\0", content:
            archive += part + bytes(-len(part) % 4)
    return archive


def run(linux: Path, program: Path, files: list[Path], variables: dict[str, str], folder: Path, timeout: float) -> str:
    """What ``program`` (static), given the files as its words, prints; no "[" may be in it."""
    entries = {"dev": (0o40755, b""), "dev/console": (0o20600, b""), "init": (0o100755, program.read_bytes())}
    entries |= {file.name: (0o100644, file.read_bytes()) for file in files}
    disk = folder / "disk"
    disk.mkdir()
    (disk / "files").write_bytes(cpio(entries))
    shutil.copy(linux, disk / "linux")
    for path in ISOLINUX:
        shutil.copy(path, disk)
    words = " ".join(f"/{file.name}" for file in files)
    text = BOOT.format(variables=" ".join(f"{name}={value}" for name, value in variables.items()), words=words)
    (disk / "isolinux.cfg").write_text(text)
    boot = ["-b", "isolinux.bin", "-c", "catalog", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", folder / "disk.iso", *boot, disk], check=True)
    (folder / "config").write_text(CONFIG)
    (folder / "commands").write_text("continue\n")
    with (folder / "out").open("wb") as out:
        command = ["bochs", "-q", "-f", "config", "-rc", "commands"]
        machine = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        # When it ends, so does Linux, in a panic that the serial line shows.
        serial, end = folder / "serial", time.monotonic() + timeout
        while time.monotonic() < end and machine.poll() is None:
            if serial.exists() and "Kernel panic" in (printed := serial.read_text(errors="replace")):
                return printed.partition("[")[0].strip()
            time.sleep(1)
        raise TimeoutError(f"no answer from Bochs; see {folder}")
    finally:
        machine.kill()
        machine.wait()
