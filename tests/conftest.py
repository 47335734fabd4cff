"""One thread for tests on tiny models: a second one only waits for the first. test_real.py takes all cores."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
