"""One thread for tests on tiny models: a second one only waits for the first. The whole suite runs in two processes
instead, where pytest-xdist is there (./setup.sh --test); a file or a test named on the command line runs in one."""
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the CPU


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the number
def pytest_cmdline_main(config):
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")  # a worker passes here too
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "worksteal"
