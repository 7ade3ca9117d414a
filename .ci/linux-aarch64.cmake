# Toolchain file: cross-compiles for AArch64 Linux with the compiler of Debian's package g++-aarch64-linux-gnu.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Headers of the Python that builds serve: nothing that they declare differs between 64-bit Linux systems.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
