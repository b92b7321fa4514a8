"""What launch.sh and launch.bat share: .venv, what goes into it, and plain words when something is wrong.

    launch.py check [dev]       exit 0 when .venv holds all that is wanted (a few ms, no network)
    launch.py install [dev]     make it so; exit 1 after one plain message on stderr
    launch.py desktop-entry     put glmui into the applications menu (Linux)

It runs before anything is installed, so it uses nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

TORCH_INDEX = "https://download.pytorch.org/whl/"
GB = 10**9
DISK_NEEDED = {"cpu": 3 * GB, "cuda": 12 * GB}  # a fresh .venv, the downloads and pip's copy of them

TEXTS = {
    "installing": (
        "Installing (once, a few minutes) …",
        "正在安装（只需一次，要几分钟）……",
    ),
    "updating": (
        "Installing what has changed …",
        "正在安装有变动的部分……",
    ),
    "still": ("{seconds} s  {step}", "{seconds} 秒  {step}"),
    "installed": ("Installed.", "安装完成。"),
    "waiting": (
        "glmui is being installed in another window; waiting for it …",
        "另一个窗口正在安装 glmui，等它完成……",
    ),
    "plain_torch": (
        "PyTorch's own package index cannot be reached; taking PyTorch from the general one "
        "(a larger download, maybe).",
        "连不上 PyTorch 自己的软件源，改从通用软件源安装 PyTorch（下载量可能更大）。",
    ),
    "no_cuda": (
        "PyTorch's own package index cannot be reached, so PyTorch comes without CUDA and the graphics card "
        "stays unused. To try again later, delete the folder .venv.",
        "连不上 PyTorch 自己的软件源，只能安装不带 CUDA 的 PyTorch，显卡暂时用不上。"
        "以后想重试，请删除 .venv 文件夹。",
    ),
    "no_venv": (
        "This Python ({python}) lacks its venv module. Install it, then start glmui again: {cure}",
        "这个 Python（{python}）缺少 venv 模块。请先装上它，再启动 glmui：{cure}",
    ),
    "no_disk": (
        "Too little room on the disk: {folder} has {free} GB free, installing needs about {needed} GB. "
        "Make room, then start glmui again.",
        "磁盘空间不够：{folder} 只剩 {free} GB，安装大约需要 {needed} GB。请腾出空间后重新启动 glmui。",
    ),
    "disk_full": (
        "The disk became full while installing into {folder}. Make room (about {needed} GB), "
        "then start glmui again.",
        "往 {folder} 安装的途中磁盘满了。请腾出大约 {needed} GB 的空间，然后重新启动 glmui。",
    ),
    "no_network": (
        "The packages could not be fetched. Check the network (or proxy), then start glmui again; "
        "once installed, it needs no network. Details: {log}",
        "下载不到所需的软件包。请检查网络（或代理），然后重新启动 glmui；装好之后不再需要网络。详情见 {log}",
    ),
    "not_writable": (
        "The folder {folder} cannot be written. Move glmui to a folder of your own, or give your account "
        "the right to write there, then start it again.",
        "文件夹 {folder} 不可写。请把 glmui 移到您自己的文件夹，或给当前账户写入权限，然后重新启动。",
    ),
    "failed": (
        "Installing did not work. The end of {log}:\n\n{tail}",
        "安装没有成功。{log} 的末尾：\n\n{tail}",
    ),
    "entry_made": (
        "glmui is now in the applications menu ({file}).",
        "glmui 已加入应用程序菜单（{file}）。",
    ),
    "entry_linux_only": (
        "Only Linux has such a menu entry. On macOS double-click launch.command, on Windows launch.bat.",
        "只有 Linux 可以添加菜单项。macOS 请双击 launch.command，Windows 请双击 launch.bat。",
    ),
}

# What pip prints for each kind of trouble, in the order in which to look.
SIGNS = {
    "disk_full": ("No space left on device", "[Errno 28]", "not enough space on the disk", "[WinError 112]"),
    "not_writable": ("[Errno 13]", "[Errno 30]", "[WinError 5]"),
    "no_network": (
        "Max retries exceeded",
        "Retrying (Retry(",
        "Could not fetch URL",
        "ReadTimeoutError",
        "Connection broken",
        "HTTP error 5",
    ),
}


class Trouble(Exception):
    """Something the reader must put right: a key of TEXTS and what goes into the sentence."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key, values)
        self.key = key
        self.values = values


def text(key: str, **values: object) -> str:
    return TEXTS[key][language() == "zh"].format(**values)


def language() -> str:
    """The reader's: zh or en, from GLMUI_LANGUAGE, the locale, or what the desktop is set to."""
    names = ("GLMUI_LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")
    chosen = next((value for name in names if (value := os.environ.get(name))), "")
    if not chosen and sys.platform == "win32":
        import ctypes

        chinese = ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF == 0x04
        return "zh" if chinese else "en"
    if not chosen and sys.platform == "darwin":
        chosen = output_of("defaults", "read", "-g", "AppleLocale") or ""
    return "zh" if chosen.lower().startswith("zh") else "en"


def output_of(*command: str) -> str | None:
    """What a program prints, or None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- what this machine wants


def cuda_build() -> str | None:
    """The torch build for this machine's NVIDIA cards, or None where there is none.

    PyTorch 2.13 comes for CUDA 12.6 (cards from Maxwell to Ada and Hopper, drivers from 525 on) and for
    CUDA 13.0 (Turing to Blackwell, drivers from 580 on): the older one serves every card but Blackwell's,
    which are those of compute capability 10 and up.
    """
    listed = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if not listed:
        return "cu126" if Path("/proc/driver/nvidia/gpus").is_dir() else None
    versions = [int(line.partition(".")[0]) for line in listed.split() if line[:1].isdigit()]
    newest = max(versions, default=0)  # an old driver does not tell: the card is no newer
    return "cu130" if newest >= 10 else "cu126"


def has_compiler() -> bool:
    """Whether a C compiler can be run. macOS has a `cc` that only offers to install one: ask xcode-select."""
    if sys.platform == "darwin":
        return output_of("xcode-select", "-p") is not None
    return any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl"))


@dataclass(frozen=True)
class Stamp:
    """What .venv holds. Written last, so that it stands for a finished installation only."""

    python: str  # "3.11"
    torch: str  # "torch==2.13.0"
    build: str  # the one asked for: "cpu", "cu126", "cu130"
    files: dict[str, str]  # requirements file: SHA-256 of its bytes

    @classmethod
    def read(cls, file: Path) -> Stamp | None:
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, file: Path) -> None:
        draft = file.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        draft.replace(file)


class Environment:
    """The folder .venv beside the launchers."""

    def __init__(self, home: Path, dev: bool = False) -> None:
        self.home = home
        self.folder = home / ".venv"
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.stamp = self.folder / "glmui-stamp.json"
        self.lock = self.folder / "installing"
        self.log = self.folder / "install.log"
        self.version = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.begin = time.monotonic()
        self.lists = ["requirements.txt"]
        self.lists += ["requirements-dev.txt"] if dev else []
        self.lists += [] if has_compiler() else ["requirements-compiler.txt"]

    def wanted(self, held: Stamp | None) -> Stamp:
        """What should be here. A card that is away (a laptop saving power) is no reason for another torch."""
        contents = {name: (self.home / name).read_bytes() for name in self.lists}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        pins = contents["requirements.txt"].decode().splitlines()
        return Stamp(
            python=self.version,
            torch=next(pin for pin in pins if pin.startswith("torch==")),
            build=held.build if held and held.build != "cpu" else cuda_build() or "cpu",
            files=(held.files if held else {}) | hashes,
        )

    def current(self) -> bool:
        """Whether nothing needs to be installed."""
        held = Stamp.read(self.stamp)
        return held is not None and held == self.wanted(held)

    def install(self) -> None:
        """Bring .venv up to date. Raises Trouble."""
        try:
            self.folder.mkdir(exist_ok=True)
            with locked(self.lock):
                if not self.current():
                    self.fill()
        except OSError as error:
            raise self.trouble(str(error)) from error

    def fill(self) -> None:
        """Install what is missing. Without a stamp nothing here is trusted: an earlier try was broken off."""
        held = Stamp.read(self.stamp)
        if held and held.python != self.version:
            held = None
        wanted = self.wanted(held)
        same_torch = held and (held.torch, held.build) == (wanted.torch, wanted.build)
        say(text("updating" if held else "installing"))
        if not same_torch:
            self.check_disk(wanted.build)
        self.stamp.unlink(missing_ok=True)
        if not held:
            self.make_afresh()
        try:
            if not same_torch:
                self.install_torch(wanted.torch, wanted.build)
            self.install_lists()
        except (Trouble, OSError):
            if held:  # pip undoes what it could not finish: what was here before still works
                held.write(self.stamp)
            raise
        wanted.write(self.stamp)
        say(text("installed"))

    def check_disk(self, build: str) -> None:
        needed = DISK_NEEDED["cpu" if build == "cpu" else "cuda"]
        free = shutil.disk_usage(self.home).free
        if free < needed:
            raise Trouble("no_disk", folder=self.home, free=f"{free / GB:.1f}", needed=f"{needed / GB:.0f}")

    def make_afresh(self) -> None:
        """An empty environment. The lock stays: this process holds it."""
        if output_of(sys.executable, "-I", "-c", "import ensurepip, venv") is None:
            raise Trouble("no_venv", python=sys.executable, cure=self.venv_cure())
        for entry in self.folder.iterdir():
            if entry == self.lock:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if not self.run(sys.executable, "-I", "-m", "venv", str(self.folder)):
            raise self.trouble()

    def venv_cure(self) -> str:
        if shutil.which("apt"):
            return f"sudo apt install python{self.version}-venv"
        return "https://www.python.org/downloads/"

    def install_torch(self, torch: str, build: str) -> None:
        """torch in the wanted build from PyTorch's own index, or what the general one has.

        Only torch itself comes from there; what it needs comes with the lists. The index is asked first with
        a short patience, so that one that cannot be reached costs seconds; the download then gets its time.
        On macOS the general index has the right build.
        """
        command = ["install", "--no-deps", "--force-reinstall", torch]
        index = ["--index-url", TORCH_INDEX + build]
        if sys.platform != "darwin":
            asked = self.pip("index", "versions", "torch", *index, "--timeout", "8", "--retries", "0")
            if asked and self.pip(*command, *index):
                return
            say(text("no_cuda" if os.name == "nt" and build != "cpu" else "plain_torch"))
        if not self.pip(*command):
            raise self.trouble()

    def install_lists(self) -> None:
        if not self.pip("install", *(word for name in self.lists for word in ("-r", str(self.home / name)))):
            raise self.trouble()

    def pip(self, *arguments: str) -> bool:
        return self.run(str(self.python), "-I", "-u", "-X", "utf8", "-m", "pip", "--no-input", *arguments)

    def run(self, *command: str) -> bool:
        """Run a program with its output in the log, showing that it lives; whether it succeeded.

        pip unpacks into .venv, not into a /tmp that may be small; a machine-wide `user = true` is set aside.
        """
        scratch = self.folder / "tmp"
        scratch.mkdir(exist_ok=True)
        places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
        quiet = {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off"}
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **places, **quiet},
            )
            try:
                show_life(process, self.log, self.begin)
            finally:
                process.kill()  # only when broken off; a finished process takes no notice
                process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        return process.returncode == 0

    def trouble(self, report: str = "") -> Trouble:
        """What went wrong, read from `report` or else from what the last program printed."""
        report = report or self.log.read_text(encoding="utf-8", errors="replace")
        key = next((key for key, signs in SIGNS.items() if any(sign in report for sign in signs)), "failed")
        return Trouble(
            key,
            folder=self.home,
            needed=DISK_NEEDED["cuda" if cuda_build() else "cpu"] // GB,
            log=self.log,
            tail="\n".join(report.splitlines()[-12:]),
        )


# --- small tools


def say(words: str) -> None:
    """Progress goes to stderr: stdout belongs to what glmui is asked for."""
    print(words, file=sys.stderr, flush=True)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold `file` for this process; wait while another start holds it. A process that dies lets go of it."""
    with file.open("a") as handle:
        told = False
        while not try_lock(handle.fileno()):
            if not told:
                say(text("waiting"))
                told = True
            time.sleep(0.5)
        yield


def try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network drives know no locks: better to go on than to stop here
        return True
    return True


def show_life(process: subprocess.Popen[bytes], log: Path, begin: float) -> None:
    """Until `process` ends: seconds since `begin` and the present step, on a terminal as one line."""
    terminal = sys.stderr.isatty()
    while True:
        try:
            process.wait(0.5 if terminal else 20)
            break
        except subprocess.TimeoutExpired:
            line = "  " + text("still", seconds=int(time.monotonic() - begin), step=step_in(log))
            sys.stderr.write(f"\r{line[:70]}\033[K" if terminal else f"{line}\n")
            sys.stderr.flush()
    if terminal:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def step_in(log: Path) -> str:
    """What pip is doing, in its own words: the last "Collecting x", "Downloading x" or "Installing"."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for words in map(str.split, reversed(lines)):
        if words[:1] == ["Installing"]:
            return words[0]
        if words[:1] in (["Collecting"], ["Downloading"]):
            return f"{words[0]} {words[1].rpartition('/')[2]}"
    return ""


# --- the applications menu


def make_desktop_entry(home: Path) -> str:
    """Write the menu entry of Linux desktops; the sentence that says so. Raises Trouble."""
    if not sys.platform.startswith("linux"):
        raise Trouble("entry_linux_only")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    file = data / "applications" / "glmui.desktop"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(desktop_entry(home), encoding="utf-8")
    except OSError as error:
        raise Trouble("not_writable", folder=file.parent) from error
    return text("entry_made", file=file)


def desktop_entry(home: Path) -> str:
    """A terminal window shows the progress, ends glmui when it is closed, and stays open after a failure."""
    command = " ".join(quoted(word) for word in ("sh", "-c", '"$0" || read -r _', str(home / "launch.sh")))
    lines = [
        "[Desktop Entry]",
        "Type=Application",
        "Name=glmui",
        "Comment=Chat with ChatGLM-6B on this computer",
        "Comment[zh_CN]=在本机与 ChatGLM-6B 对话",
        f"Exec={command}",
        f"Icon={escaped(str(home / 'assets' / 'icon.svg'))}",
        "Terminal=true",
        "Categories=Utility;",
    ]
    return "\n".join(lines) + "\n"


def quoted(word: str) -> str:
    """A word of an Exec line (Desktop Entry Specification 1.5): quoted as an argument, then as a value."""
    for character in '\\"`$':
        word = word.replace(character, "\\" + character)
    return escaped(f'"{word}"').replace("%", "%%")


def escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def main(arguments: list[str]) -> int:
    """Exit code 0 when done; else the one message for the reader stands on stdout."""
    home = Path(__file__).resolve().parent
    command, dev = arguments[0], "dev" in arguments[1:]
    try:
        if command == "check":
            return 0 if Environment(home, dev).current() else 1
        if command == "desktop-entry":
            print(make_desktop_entry(home))
        else:
            Environment(home, dev).install()
    except Trouble as trouble:
        print(text(trouble.key, **trouble.values))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
