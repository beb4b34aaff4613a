"""What pyproject.toml cannot say: the extension module, and the tag of a wheel that serves every CPython from 3.9
on.
"""

import sysconfig

from setuptools import setup

free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["csrc/build_ffi.py:ffi"],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp39"}},
)
