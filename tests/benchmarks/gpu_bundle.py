"""What a bare machine with PyTorch lacks, in one folder that can be carried there; and how it is laid out there.

    make gpu-bundle                     in .gpu: wheels, a trained ResNet-20, a few hundred images, the commit

Nothing is installed on the other machine and nothing fetched: the project is linked where it lies, wheels are unpacked.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / ".gpu"
LACKING = ["pydantic", "pydantic-core", "annotated-types", "typing-inspection", "tensorly"]
"""Dependencies that an image made for PyTorch seldom has."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 27, 28)]
WHEELS = ["--no-deps", "--only-binary=:all:", "--implementation=cp", *(f"--platform={name}" for name in PLATFORMS)]
CALIBRATION, EVALUATION = 256, 846
LARGEST = 64 * 2**20


def lay(folder: Path, bundle: Path, root: Path = ROOT) -> None:
    """Two folders to import from: `project`, as an installation leaves it with its entry points, and `wheels`."""
    project, wheels = folder / "project", folder / "wheels"
    about = project / "model_surgery-0.dist-info"
    about.mkdir(parents=True)
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    for name, place in settings["tool"]["setuptools"]["package-dir"].items():
        (project / name).symlink_to(root / place)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {settings['project']['name']}\nVersion: 0\n")
    points = settings["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    for wheel in sorted(bundle.glob("wheels/*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(wheels)


def commit(bundle: Path, root: Path = ROOT) -> str:
    """Of the working tree where there is git, else of the bundle; `+` where files have changed."""
    note = bundle / "commit"
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        return head + "+" * bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return note.read_text().strip() if note.exists() else "unknown"


def _git(root: Path, *words: str) -> str:
    found = subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def fetch_wheels(folder: Path, python: str, names: Iterable[str]) -> None:
    """In the versions that are installed here."""
    wanted = [f"{name}=={version(name)}" for name in names]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *WHEELS, f"--python-version={python}", f"--dest={folder}", *wanted], check=True)


def copy_data(folder: Path, shared: Path) -> None:
    """The network with its weights, and lossless images of CIFAR-10: the first of each split."""
    import numpy as np

    for name in ("resnet_cifar.py", "resnet20_original.safetensors"):
        (folder / name).write_bytes((shared / "models" / name).read_bytes())
    with np.load(shared / "data" / "cifar10_lossless.npz") as archive:
        parts = {
            "calibration": archive["train_images"][:CALIBRATION],
            "images": archive["test_images"][:EVALUATION],
            "labels": archive["test_labels"][:EVALUATION],
        }
    np.savez_compressed(folder / "cifar10.npz", **parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUNDLE)
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--lacking", nargs="*", default=LACKING, help="packages that it has not")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    options = parser.parse_args()
    wheels = options.folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for old in wheels.iterdir():
        old.unlink()
    if options.lacking:
        fetch_wheels(wheels, options.python, options.lacking)
    copy_data(options.folder, options.shared)
    (options.folder / "commit").write_text(commit(options.folder) + "\n")
    size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
    print(f"{options.folder}: {size / 2**20:.1f} MiB")
    sys.exit(size > LARGEST)


if __name__ == "__main__":
    main()
