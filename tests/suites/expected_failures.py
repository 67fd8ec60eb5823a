"""Others' own tests that cannot pass with sandboxed kernels, each with its reason.

Names as in pytest's JUnit report: "module.Class::test[parameters]". A test that is listed here and
passes is an error too, so that this list stays as short as it can be.
"""

from __future__ import annotations

from collections.abc import Mapping

_ASKS_FOR_TCP = (
    "sets c.KernelManager.transport = 'tcp'. A sandbox has no network, so we refuse and say which "
    "option to remove; the same test with ipc passes."
)
_IS_TCP = "asserts that the connection is tcp. Ours is ipc, since a sandbox has no network."
_SNIFFS_TCP = (
    "reads what goes over a tcp port. There is none; unix sockets in a directory of mode 0700 take "
    "its place."
)
_START = (
    "has a kernel that ends before it binds its sockets, and expects the start to succeed and the "
    "restarter to give up. Our start fails at once, with what the kernel wrote."
)

_MANAGER = "tests.test_kernelmanager"
_MULTI = "tests.test_multikernelmanager"
_RESTARTER = "tests.test_restarter"
_CURVE = "tests.test_transport_security::test_iopub_plaintext_visibility_depends_on_curve"

EXPECTED_FAILURES: Mapping[str, str] = {
    f"{_MANAGER}.TestKernelManager::test_lifecycle[tcp]": _ASKS_FOR_TCP,
    f"{_MANAGER}.TestKernelManager::test_subclass_callables[tcp]": _ASKS_FOR_TCP,
    f"{_MANAGER}.TestParallel::test_start_sequence_kernels[tcp]": _ASKS_FOR_TCP,
    f"{_MANAGER}.TestParallel::test_start_parallel_thread_kernels[tcp]": _ASKS_FOR_TCP,
    f"{_MANAGER}.TestParallel::test_start_sequence_process_kernels[tcp]": _ASKS_FOR_TCP,
    f"{_MANAGER}.TestAsyncKernelManager::test_lifecycle[AsyncKernelManager-tcp]": _ASKS_FOR_TCP,
    f"{_MANAGER}.TestAsyncKernelManager::test_lifecycle[AsyncKMSubclass-tcp]": _ASKS_FOR_TCP,
    f"{_MANAGER}.TestAsyncKernelManager::test_subclass_callables[tcp]": _ASKS_FOR_TCP,
    f"{_RESTARTER}::test_restart_check[tcp]": _ASKS_FOR_TCP,
    f"{_RESTARTER}::test_restarter_gives_up[tcp]": _ASKS_FOR_TCP,
    f"{_RESTARTER}::test_async_restart_check[tcp]": _ASKS_FOR_TCP,
    f"{_RESTARTER}::test_async_restarter_gives_up[tcp]": _ASKS_FOR_TCP,
    f"{_MULTI}.TestKernelManager::test_tcp_cinfo": _IS_TCP,
    f"{_MULTI}.TestAsyncKernelManager::test_tcp_cinfo": _IS_TCP,
    f"{_CURVE}[disabled]": _SNIFFS_TCP,
    f"{_CURVE}[auto]": _SNIFFS_TCP,
    f"{_CURVE}[required]": _SNIFFS_TCP,
    f"{_RESTARTER}::test_restarter_gives_up[ipc]": _START,
    f"{_RESTARTER}::test_async_restarter_gives_up[ipc]": _START,
}

# -- of programs that run kernels: ipykernel, nbclient, nbconvert, papermill

_HOST_PROFILE = (
    "starts IPython with the --profile-dir of the host's home, which a sandbox does not show. A "
    "volume does."
)
_HOST_TMP = "has the kernel write a file below the host's /tmp. A sandbox has a /tmp of its own."

OF_PROGRAMS: Mapping[str, Mapping[str, str]] = {
    "ipykernel": {
        "tests.test_kernel::test_sys_path_profile_dir": _HOST_PROFILE,
        "tests.test_kernel::test_save_history": _HOST_TMP,
    },
    "nbclient": {},
    "nbconvert": {},
    "papermill": {},
}
