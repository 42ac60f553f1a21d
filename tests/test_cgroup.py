"""The CPU quota of control groups, read from made files of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from singlequant import _C

V1 = "3:cpu,cpuacct:"
V1_MOUNT = "33 31 0:30 {top} {point} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2_MOUNT = "41 31 0:38 {top} {point} rw - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n44 31 0:9 / /sys/fs/cgroup/cpuset rw - cgroup c " \
         "rw,cpuset\n"


def machine(root: Path, group: str, mount: str, files: dict[str, str], top: str = "/",
            point: str = "/sys/fs/cgroup/cpu") -> Path:
    """A root folder whose process is in `group`, with the named files below the mount point."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(f"9:name=systemd:/a\n4:cpuset:/b\n{group}\n")
    (proc / "mountinfo").write_text(OTHERS + mount.format(top=top, point=point) + "\n")
    for name, text in files.items():
        path = root / point.replace("\\040", " ").strip("/") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpus(*arguments, **options) -> int:
    return _C.cgroup_cpus(str(machine(*arguments, **options)))


@pytest.mark.parametrize(("text", "expected"), [
    ("200000 100000\n", 2), ("150000 100000\n", 2), ("1000 100000\n", 1), ("400001 100000", 5),
    ("max 100000\n", 0), ("", 0), ("-1 100000", 0), ("0 100000", 0), ("100000 0", 0),
    ("100000", 0), ("100000 x", 0), ("\xff\xff", 0), ("9" * 18 + " 1", 0),
])
def test_quota_of_version_2_is_rounded_up(tmp_path, text, expected):
    assert cpus(tmp_path, "0::/job", V2_MOUNT, {"job/cpu.max": text}) == expected


@pytest.mark.parametrize(("quota", "period", "expected"), [
    ("250000\n", "100000\n", 3), ("-1\n", "100000\n", 0), ("50000", "100000", 1),
    ("50000", "", 0), ("", "100000", 0),
])
def test_quota_of_version_1_is_rounded_up(tmp_path, quota, period, expected):
    files = {"job/cpu.cfs_quota_us": quota, "job/cpu.cfs_period_us": period}
    assert cpus(tmp_path, f"{V1}/job", V1_MOUNT, files) == expected


@pytest.mark.parametrize(("files", "expected"), [
    ({"a/cpu.max": "300000 100000", "a/b/c/cpu.max": "max 100000"}, 3),
    ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
    ({"a/cpu.max": "100000 100000", "a/b/c/cpu.max": "800000 100000"}, 1),
    ({"cpu.max": "400000 100000"}, 4),
    ({"other/cpu.max": "100000 100000"}, 0),
])
def test_groups_above_count_too(tmp_path, files, expected):
    assert cpus(tmp_path, "0::/a/b/c", V2_MOUNT, files) == expected


@pytest.mark.parametrize("group", ["/docker/12ab", "/docker/12ab/child", "/", "/../x", "/dock"])
def test_container_sees_its_part_of_the_tree(tmp_path, group):
    files = {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}
    assert cpus(tmp_path, V1 + group, V1_MOUNT, files, top="/docker/12ab") == 2


def test_spaces_in_the_mount_point(tmp_path):
    files = {"j b/cpu.max": "200000 100000"}
    assert cpus(tmp_path, "0::/j b", V2_MOUNT, files, point="/a\\040b") == 2


def test_both_versions_together(tmp_path):
    root = machine(tmp_path, f"{V1}/job\n0::/job", V1_MOUNT,
                   {"job/cpu.cfs_quota_us": "300000", "job/cpu.cfs_period_us": "100000"})
    mounts = root / "proc/self/mountinfo"
    mounts.write_text(mounts.read_text() + V2_MOUNT.format(top="/", point="/two") + "\n")
    (root / "two/job").mkdir(parents=True)
    (root / "two/job/cpu.max").write_text("200000 100000")
    assert _C.cgroup_cpus(str(root)) == 2
    (root / "two/job/cpu.max").write_text("400000 100000")
    assert _C.cgroup_cpus(str(root)) == 3


@pytest.mark.parametrize(("group", "mount"), [
    ("", V2_MOUNT), ("0::/job", ""), ("0:", V2_MOUNT), ("::::", V2_MOUNT), ("0::/job", "- - - -"),
    ("0::/job", "1 2 3 - cgroup2"), ("0::/job", " - cgroup2 x rw"), ("0::" + "/a" * 5000, V2_MOUNT),
    ("0::/job", "41 31 0:38 / " + "/b" * 5000 + " rw - cgroup2 cgroup2 rw"),
])
def test_odd_files_set_no_quota(tmp_path, group, mount):
    assert cpus(tmp_path, group, mount, {"job/cpu.max": "100000 100000"}) == 0


def test_missing_files_set_no_quota(tmp_path):
    assert _C.cgroup_cpus(str(tmp_path / "nothing")) == 0
    with pytest.raises(TypeError):
        _C.cgroup_cpus(3)


@pytest.mark.parametrize("narrow", ["", "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"])
def test_pool_has_the_fewer_of_affinity_and_quota(narrow):
    code = f"import os; {narrow} from singlequant import _C; print(_C.get_num_threads())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k != "SINGLEQUANT_NUM_THREADS"})
    affinity = 1 if narrow else len(os.sched_getaffinity(0))
    assert int(run.stdout) == min(affinity, _C.cgroup_cpus("") or 256)
