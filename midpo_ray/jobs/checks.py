"""What a job needs, checked before a cluster is asked: its recipe, its paths, its modules."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..cluster.common import secret_faults
from ..config import SCORES, Config, digest, dump, load_config
from ..errors import UserError
from ..pipeline.plan import BUILTIN
from ..user_code import source_file

SHARED = "/mnt/midpo"  # the shared folder of the shipped cluster files
_NETWORK = re.compile(
    r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|afs|orangefs|wekafs|panfs|efs|vast|fuse\."
)
_MOUNTS = Path("/proc/mounts")
_DATA_FILE = re.compile(r"\.(jsonl?|parquet|csv)(\.gz)?$")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run that can be submitted. ``id`` is the same wherever and how often it is submitted."""

    config: Config
    name: str
    run_dir: str

    @property
    def id(self) -> str:
        return f"midpo-{self.name}-{digest(self.run_dir)[:8]}"


def prepare_job(
    recipe: str,
    overrides: list[str],
    name: str | None = None,
    run_dir: str | None = None,
    shared: str | None = None,
) -> Job:
    """Check a recipe as a job.

    Args:
        shared: a folder that every node reaches under the same path.

    Raises:
        UserError: the recipe is wrong, holds a secret, or names a path that nodes cannot see.
    """
    config = load_config(recipe, overrides)
    name = name or config.name
    run_dir = run_dir or f"{SHARED}/runs/{name}"
    content = config.model_dump(mode="json", exclude_none=True)
    for key, what in secret_faults([content, {"name": name, "run-dir": run_dir}], dump(config)):
        raise UserError(f"{key}: {what}")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name}: letters, digits, dot, dash and underscore are expected")
    for key, path in {"--run-dir": run_dir, **_paths(config)}.items():
        why = unseen(path, run_dir, shared, result=key in ("--run-dir", "cache"))
        if why:
            raise UserError(
                f"{key} {path}: {why}; name a path that every node reaches, such as {SHARED}/..., "
                "or name the folder that they share by --shared"
            )
    return Job(config, name, run_dir)


def _paths(config: Config) -> dict[str, str]:
    """The paths that a recipe names and the nodes must see, by key."""
    named = {"model.path": config.model.path, "cache": config.cache}
    for number, data_set in enumerate(config.data.sets):
        named[f"data.sets.{number}.path"] = data_set.path
    for kind in SCORES:
        scorer = getattr(config.scores, kind)
        named[f"scores.{kind}.model"] = scorer.model if scorer else None
    return {key: path for key, path in named.items() if path}


def unseen(
    path: str, run_dir: str, shared: str | None = None, *, result: bool = False
) -> str | None:
    """Why the nodes cannot see a path that is named here; None where they can, or may.

    Args:
        run_dir: what it is in, /mnt/midpo of /mnt/midpo/runs/NAME, every node reaches.
        shared: a folder that every node reaches, too.
        result: the run writes the path, so it need not exist, and it is not a hub name.
    """
    if path.startswith(BUILTIN) or ("://" in path and not path.startswith("file://")):
        return None
    place = Path(path.removeprefix("file://")).expanduser()
    if not place.is_absolute():
        is_hub_name = _HUB_NAME.fullmatch(path) and not _DATA_FILE.search(path)
        if is_hub_name and not result and not place.exists():
            return None
        return "is relative to a folder of this machine"
    area = Path(*Path(run_dir.removeprefix("file://")).parts[:3])
    is_reached = _on_network(place) or (shared is not None and place.is_relative_to(shared))
    if not is_reached:
        own = (Path.home(), Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"))
        if any(place.is_relative_to(folder) for folder in own if folder != Path("/")):
            return "is in a home or temporary folder on this machine's own disk"
        is_reached = place.is_relative_to(area)
    if result or place.exists() == is_reached:
        return None
    if is_reached:
        return "does not exist" if area.is_dir() or not place.is_relative_to(area) else None
    same_disk = place.exists() and place.stat().st_dev == Path("/").stat().st_dev
    return "is on this machine's own disk" if same_disk else None


def _on_network(place: Path) -> bool:
    """Whether a path is on a network file system, such as a home on NFS."""
    try:
        mounts = _MOUNTS.read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return False
    kinds = {fields[1]: fields[2] for fields in map(str.split, mounts)}
    for folder in (place, *place.parents):
        if str(folder) in kinds:
            return bool(_NETWORK.match(kinds[str(folder)]))
    return False


def package(config: Config, folder: Path) -> None:
    """Write what a job brings along: the resolved recipe, and the scorers' modules from here.

    Raises:
        UserError: a scorer's module is not found.
    """
    (folder / "run.yaml").write_text(dump(config), "utf-8")
    for kind in SCORES:
        scorer = getattr(config.scores, kind)
        if scorer and scorer.function:
            _package_module(scorer.function, f"scores.{kind}.function", folder)


def _package_module(function: str, key: str, folder: Path) -> None:
    """Copy a module of the working directory: its file, or the whole package that it is in."""
    file = source_file(function, f"{key} {function}")
    top = function.partition(":")[0].partition(".")[0]
    if file is not None and file.resolve() == Path(f"{top}.py").resolve():
        shutil.copy(file, folder)
    elif file is not None and file.resolve().is_relative_to(Path(top).resolve()):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(top, folder / top, ignore=ignored, dirs_exist_ok=True)
    elif top != "midpo_ray":
        log.warning("%s %s: %s must be installed on the nodes", key, function, top)
