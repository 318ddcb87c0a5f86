"""A stand-in for PBS on one host, for tests. This is not PBS: it places nothing and measures nothing.

It keeps what a real OpenPBS 23.06 was seen to do to whoever calls qsub, qstat and qdel and to a job: its
refusals and exit codes, the job's whole environment, $HOME, umask, standard input, the spooled copy of the
script, output only at the end unless `-k` has a d, a dependency on an unknown job that makes it vanish,
TERM and KILL for a session. $PBS_STANDIN is its folder; a file `down` there is a server that is down.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["PBS_STANDIN"])
QUEUES = ("workq", "debug", "prod")
KILL_DELAY_S = 1.0
FINISHED, UNKNOWN, DOWN_QSTAT, DOWN_QSUB, UNKNOWN_QUEUE = 35, 153, 255, 162, 170


def refuse(command, text, code):
    print(f"{command}: {text}", file=sys.stderr)
    sys.exit(code)


def connect(command):
    if (HOME / "down").exists():
        print("Connection refused", file=sys.stderr)
        refuse(
            command, "cannot connect to server pbs (errno=15010)", DOWN_QSUB if command == "qsub" else 255
        )


def record(job_id):
    return HOME / "jobs" / f"{job_id}.json"


def load(job_id):
    try:
        return json.loads(record(job_id).read_text())
    except FileNotFoundError:
        return None


def save(job):
    path = record(job["id"])
    path.with_suffix(".new").write_text(json.dumps(job))
    path.with_suffix(".new").replace(path)


# --- qsub ----------------------------------------------------------------------------------------


def parse(words, found):
    """qsub's options into `found`, those that are there already being stronger; the rest."""
    given, rest = {}, []
    words = list(words)
    while words:
        word = words.pop(0)
        if not re.match(r"-[a-zA-Z]", word):
            rest.append(word)
            continue
        option, value = word[:2], word[2:] or (words.pop(0) if words else "")
        if option not in "-A -N -q -l -k -j -o -e -J -r -W -v -S -m".split():
            refuse("qsub", f"invalid option -- '{option[1]}'", 2)
        given.setdefault(option, []).append(value)
    for option, values in given.items():
        if option == "-l":
            found.setdefault("-l", []).extend(values)
        else:
            found.setdefault(option, values)
    return rest


def qsub(arguments):  # noqa: PLR0912 PLR0915  a refusal each
    connect("qsub")
    options = {}
    rest = parse(arguments, options)
    if len(rest) != 1:
        refuse("qsub", "usage: qsub [options] script", 2)
    try:
        text = Path(rest[0]).read_bytes().decode()
    except OSError:
        refuse("qsub", "script file:: No such file or directory", 1)
    if "\r\n" in text:
        refuse("qsub", "script contains cr, lf", 1)
    for line in text.splitlines():
        if line.startswith("#PBS "):
            parse(shlex.split(line[5:]), options)
        elif line.strip() and not line.startswith("#"):
            break
    name = options.get("-N", [Path(rest[0]).name])[0]
    if re.search(r"[\s/]", name) or len(name) > 230:
        refuse("qsub", "illegal -N value", 2)
    queue = options.get("-q", ["workq"])[0]
    if queue not in QUEUES:
        refuse("qsub", "Unknown queue", UNKNOWN_QUEUE)
    resources = [part for value in options.get("-l", []) for part in value.split(",")]
    if any(r.startswith("select=") for r in resources) and any(r.startswith("ncpus=") for r in resources):
        refuse("qsub", '"-lresource=" cannot be used with "select" or "place", resource is: ncpus', 2)
    array = options.get("-J", [None])[0]
    if array is not None:
        span = re.fullmatch(r"(\d+)-(\d+)(%\d+)?", array)
        if not span or int(span[1]) >= int(span[2]):
            refuse("qsub", "illegal -J value", 2)
        if options.get("-r") == ["n"]:
            refuse("qsub", "cannot submit non-rerunable Array Job", 1)
    if re.search(r"\[\d+\]", options.get("-W", [""])[0]):  # as PBS's documentation has it
        refuse("qsub", "illegal -W value", 2)
    for where in options.get("-o", []):
        if not (where.isascii() and where.isprintable()):
            refuse("qsub", "illegal -o value", 2)
    (HOME / "jobs").mkdir(parents=True, exist_ok=True)
    if (HOME / f"one-job-in-{queue}").exists():
        jobs = [json.loads(path.read_text()) for path in (HOME / "jobs").glob("*.json")]
        if any(job["queue"] == queue and job["state"] != "F" for job in jobs):
            refuse("qsub", f"would exceed queue {queue}'s per-user limit", 1)
    number = 1 + max((int(re.match(r"\d+", p.name)[0]) for p in (HOME / "spool").glob("*.SC")), default=0)
    (HOME / "spool").mkdir(exist_ok=True)
    spooled = HOME / "spool" / f"{number}.pbs.SC"
    spooled.write_text(text)
    spooled.chmod(0o700)
    job = {
        "id": f"{number}[].pbs" if array else f"{number}.pbs", "name": name, "queue": queue, "state": "Q",
        "number": number, "script": str(spooled), "resources": resources, "workdir": str(Path.cwd()),
        "output": options.get("-o", [None])[0], "keep": options.get("-k", ["n"])[0], "comment": "",
        "after": options.get("-W", [""])[0].removeprefix("depend=afterany:"),
        "variables": options.get("-v", [""])[0],
        "indices": list(range(int(span[1]), int(span[2]) + 1)) if array else None,
    }  # fmt: skip
    save(job)
    for index in job["indices"] or []:
        save(job | {"id": f"{number}[{index}].pbs", "indices": None})
    with (HOME / "log").open("a") as log:
        subprocess.Popen(
            [sys.executable, __file__, "mom", job["id"]], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # nobody's child, and with nothing of the submitter's environment
            env={"PBS_STANDIN": str(HOME), "PBS_STANDIN_PATH": os.environ["PATH"], "PATH": os.defpath},
        )  # fmt: skip
    print(job["id"])


# --- what MoM does -------------------------------------------------------------------------------


def mom(job_id):
    job = load(job_id)
    if job["after"]:
        before = load(job["after"])
        if before is None:
            record(job_id).unlink()  # silently
            return
        job["state"] = "H"
        save(job)
        while (before := load(job["after"])) and before["state"] != "F":
            time.sleep(0.1)
        if load(job_id)["state"] == "F":  # qdel
            return
    nodes = next((r for r in job["resources"] if r.startswith("select=")), "select=1")
    cpus = re.search(r"ncpus=(\d+)", nodes)
    if int(re.match(r"select=(\d+)", nodes)[1]) > 8 or (cpus and int(cpus[1]) > 1000):
        save(job | {"state": "Q", "comment": "Can Never Run: Insufficient amount of resource: vnode"})
        return
    if job["indices"] is None:
        run(job)
        return
    save(job | {"state": "B"})
    for index in job["indices"]:
        cell = load(f"{job['number']}[{index}].pbs")
        if cell["state"] != "F":
            run(cell, index, job["id"])
    save(job | {"state": "F"})


def run(job, index=None, array_id=None):
    job_id, spool = job["id"], HOME / "spool"
    chunk = dict(
        part.split("=", 1) for r in job["resources"] if r.startswith("select=") for part in r.split(":")
    )
    nodefile = spool / f"{job_id}.nodes"
    count = int(chunk.get("select", 1)) * int(chunk.get("mpiprocs", 1))
    nodefile.write_text(f"{socket.gethostname()}\n" * count)
    temporary = HOME / "tmp" / f"pbs.{job_id}"
    temporary.mkdir(parents=True, exist_ok=True)
    user = pwd.getpwuid(os.getuid())
    home = HOME / "home"  # a profile of this machine's user may do anything to the job
    home.mkdir(exist_ok=True)
    cpus = chunk.get("ncpus", "1")
    environment = {
        "ENVIRONMENT": "BATCH", "HOME": str(home), "LOGNAME": user.pw_name, "USER": user.pw_name,
        "SHELL": "/bin/bash", "SHLVL": "2", "NCPUS": cpus, "OMP_NUM_THREADS": cpus,
        "TMPDIR": str(temporary), "PATH": "/usr/local/bin:/usr/bin:/bin", "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_JOBCOOKIE": "0" * 32,
        "PBS_JOBDIR": str(home), "PBS_JOBID": job_id, "PBS_JOBNAME": job["name"], "PBS_MOMPORT": "15003",
        "PBS_NODEFILE": str(nodefile), "PBS_NODENUM": "0", "PBS_TASKNUM": "1", "PBS_QUEUE": job["queue"],
        "PBS_O_HOME": str(home), "PBS_O_HOST": socket.gethostname(), "PBS_O_LOGNAME": user.pw_name,
        "PBS_O_PATH": os.environ["PBS_STANDIN_PATH"], "PBS_O_QUEUE": job["queue"],
        "PBS_O_SHELL": "/bin/bash", "PBS_O_SYSTEM": "Linux", "PBS_O_WORKDIR": job["workdir"],
    }  # fmt: skip
    environment |= dict(word.split("=", 1) for word in job["variables"].split(",") if word)
    if index is not None:
        environment |= {"PBS_ARRAY_INDEX": str(index), "PBS_ARRAY_ID": array_id}
    target = Path((job["output"] or f"{job['workdir']}/{job['name']}.o{job['number']}").replace(
        "^array_index^", str(index)))  # fmt: skip
    direct = "d" in job["keep"] and target.parent.is_dir()
    spooled = target if direct else spool / f"{job_id}.OU"
    with spooled.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/bash", "-lc", '"$1"; exit $?', "-bash", job["script"]], cwd=home,
            env={**environment, "PBS_STANDIN": str(HOME)},  # as a real one's commands have /etc/pbs.conf
            umask=0o077, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    process.stdin.close()
    save(job | {"state": "R", "session": process.pid})
    try:
        code = process.wait(timeout=walltime_s(job["resources"]))
    except subprocess.TimeoutExpired:
        limit_s = int(walltime_s(job["resources"]))
        with spooled.open("ab") as output:  # before the signal, as the real one
            output.write(f"=>> PBS: job killed: walltime {limit_s + 2} exceeded limit {limit_s}\n".encode())
        end_session(process.pid)
        process.wait()
        code = -29
    if not direct and target.parent.is_dir():  # else it is lost, and nobody says so
        shutil.copy(spooled, target)
    save(job | {"state": "F", "exit_status": code, "environment": environment})


def walltime_s(resources):
    for resource in resources:
        if resource.startswith("walltime="):
            hours, minutes, seconds = map(int, resource.removeprefix("walltime=").split(":"))
            return hours * 3600 + minutes * 60 + seconds
    return None


def end_session(session):
    """TERM, then KILL, to every process of the session; one that left it is not touched."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                    os.kill(int(stat.parent.name), number)
        time.sleep(KILL_DELAY_S if number == signal.SIGTERM else 0)


# --- qstat and qdel ------------------------------------------------------------------------------


def qstat(arguments):
    connect("qstat")
    code = 0
    for job_id in [word for word in arguments if not word.startswith("-")]:
        job = load(job_id)
        if job is None:
            print(f"qstat: Unknown Job Id {job_id}", file=sys.stderr)
            code = UNKNOWN
        elif job["state"] == "F":
            print(f"qstat: {job_id} Job has finished, use -x or -H to obtain historical job information",
                  file=sys.stderr)  # fmt: skip
            code = FINISHED
        else:
            print(f"Job Id: {job_id}\n    Job_Name = {job['name']}\n    job_state = {job['state']}")
            print(f"    queue = {job['queue']}\n    comment = {job['comment'] or 'Job run'}\n")
    return code


def qdel(arguments):
    connect("qdel")
    code = 0
    for job_id in arguments:
        job = load(job_id)
        if job is None or job["state"] == "F":
            print(
                f"qdel: {'Unknown Job Id' if job is None else 'Job has finished'} {job_id}", file=sys.stderr
            )
            code = UNKNOWN if job is None else FINISHED
            continue
        for one in [job, *(load(f"{job['number']}[{i}].pbs") for i in job["indices"] or [])]:
            running = one["state"] == "R"
            save(one | {"state": "F", "exit_status": 271})
            if running:
                end_session(one["session"])
    return code


if __name__ == "__main__":
    sys.exit(
        {"qsub": qsub, "qstat": qstat, "qdel": qdel, "mom": lambda words: mom(*words)}[sys.argv[1]](
            sys.argv[2:]
        )
    )
