"""The C++ kernels: their source, its build and cache, and the library's face to Python."""
