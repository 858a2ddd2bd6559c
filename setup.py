"""Everything is declared in setup.cfg; a build notes the commit that it is made from, for the records of its runs."""

import importlib.util
import json
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCommit(build_py):
    """Writes what `source_state` says of this checkout beside it; an editable installation asks the checkout itself."""

    def run(self) -> None:
        """See setuptools."""
        super().run()
        if self.editable_mode:
            return
        spec = importlib.util.spec_from_file_location("machine", Path(__file__).parent / "benchmark/core/machine.py")
        assert spec is not None
        assert spec.loader is not None
        machine = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(machine)
        commit, dirty = machine.source_state()
        note = Path(self.build_lib, "dualcl/benchmark/core", machine.BUILT_FROM)
        found = {"commit": commit, "dirty": dirty, "diff": machine.source_diff()}
        note.write_text(json.dumps(found) + "\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildWithCommit})
