"""Tests use one thread, because on tiny models a second thread only waits for the first. If pytest-xdist is installed
(./setup.sh --test), the whole suite runs in two processes; a file or test named on the command line runs in one."""
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU


@pytest.hookimpl(tryfirst=True)  # before xdist's own hook, which reads the number of processes
def pytest_cmdline_main(config):
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")  # a worker passes here too
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "worksteal"
