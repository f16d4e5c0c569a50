"""Processes that start in no time: they are forked from one that has imported the product once."""

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.studies.worker", "tests.search.loaders", "tests.search.killable_search"])
