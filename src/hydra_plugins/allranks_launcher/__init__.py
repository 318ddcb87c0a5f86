"""`hydra/launcher=allranks`: runs the sweep of any Hydra application on many ranks.

With `-m` a Hydra application runs once for each combination of values; Hydra calls each of these a job.
This plugin starts a job as `allranks launch -- python app.py OVERRIDES`, one after another, on the nodes
that are there. With `hydra.launcher.walltime` it queues each job with `allranks submit` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

from allranks.launch.options import OPTIONS, words

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


# The keys of `hydra.launcher`: the options of `allranks launch` and `allranks submit` that hold for each
# job of a sweep. null leaves an option out. With a walltime the jobs are queued. A dataclass cannot be made
# here, because Hydra runs the module before it is among sys.modules.
KEYS: dict[str, Any] = {
    "_target_": "hydra_plugins.allranks_launcher.AllranksLauncher",
    **{option.name: None for option in OPTIONS if option.in_sweep},
    "preflight": True,
    "overrides": [],  # machine.key=value
}
ConfigStore.instance().store("allranks", KEYS, group="hydra/launcher", provider="allranks")


class AllranksLauncher(Launcher):  # type: ignore[misc,unused-ignore]
    """Hydra's launcher: it starts each job of a sweep as a process of its own.

    What the application returns stays in that process, so Hydra gets no value.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        return [
            self._one(list(words), number) for number, words in enumerate(job_overrides, initial_job_idx)
        ]

    def _one(self, overrides: list[str], number: int) -> JobReturn:
        """Runs or queues one job of the sweep, and waits until that command has ended."""
        import subprocess
        import sys
        from pathlib import Path

        from hydra.core.utils import JobReturn, JobStatus
        from omegaconf import OmegaConf, open_dict

        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number

        # What Hydra itself writes into a job's directory is written here, once, rather than by each rank.
        directory = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
        records = directory / (config.hydra.output_subdir or "")
        records.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(overrides), records / "overrides.yaml")
        keys = [str(key) for key in config if key != "hydra"]
        OmegaConf.save(OmegaConf.masked_copy(config, keys), records / "config.yaml")

        quoted = str(directory).replace("\\", "\\\\").replace("'", "\\'")
        own = [f"hydra.run.dir='{quoted}'", f"hydra.job.num={number}", f"hydra.job.id={number}"]
        program = [sys.executable, *_application(), *overrides, *self._hydra_overrides(), *own]
        program.append("hydra.output_subdir=null")
        argv = [sys.executable, "-m", "allranks", *self._command(), "--", *program]
        code = subprocess.run(argv, check=False).returncode

        result = JobReturn(
            overrides=overrides, cfg=config, working_dir=str(directory), task_name=config.hydra.job.name
        )
        result.status = JobStatus.FAILED if code else JobStatus.COMPLETED
        result.return_value = RuntimeError(f"job {number} ended with exit code {code}") if code else None
        return result

    def _command(self) -> list[str]:
        """`launch`, or with a walltime `submit`, and its options."""
        from hydra.errors import HydraException

        command = "submit" if self.options["walltime"] else "launch"
        for option in OPTIONS:
            is_given = option.in_sweep and self.options[option.name] is not None
            if is_given and not getattr(option, command):
                raise HydraException(
                    f"hydra.launcher.{option.name} is for jobs that are queued: give "
                    "hydra.launcher.walltime too, or leave it out."
                )
        in_sweep = [option for option in OPTIONS if option.in_sweep]
        return [command, *words(in_sweep, self.options), *self.options["overrides"]]

    def _hydra_overrides(self) -> list[str]:
        """The user's own `hydra.x=y`, but for what makes it a sweep."""
        ours = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweep", "hydra.mode")
        return [
            word for word in self.config.hydra.overrides.hydra if not word.lstrip("+~").startswith(ours)
        ]


def _application() -> list[str]:
    """The words by which Python was started with the application, and Hydra's flags after them."""
    import sys
    from pathlib import Path

    from allranks.compose import split_flags

    spec = sys.modules["__main__"].__spec__
    start = [str(Path(sys.argv[0]).absolute())] if spec is None else ["-m", spec.name]
    return [*start, *(word for word in split_flags(sys.argv[1:])[0] if word not in ("-m", "--multirun"))]
