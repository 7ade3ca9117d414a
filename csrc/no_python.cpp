// What the extension _C wants of Python's data when it is loaded, for processes without Python, which use its kernels
// alone: its functions of Python are looked up when they are called, which they never are there. Weak, and seen by
// others only if aot.cpp finds no Python.
#include <cstddef>

#define NYBBLE_ABSENT __attribute__((weak, visibility("default")))

extern "C" {

NYBBLE_ABSENT std::max_align_t _Py_TrueStruct[64], _Py_FalseStruct[64], _Py_NoneStruct[64],
    _Py_NotImplementedStruct[64], _Py_EllipsisObject[64], PyBaseObject_Type[64], PyBool_Type[64], PyByteArray_Type[64],
    PyBytes_Type[64], PyCFunction_Type[64], PyCapsule_Type[64], PyDict_Type[64], PyFloat_Type[64], PyFrozenSet_Type[64],
    PyGen_Type[64], PyInstanceMethod_Type[64], PyList_Type[64], PyLong_Type[64], PyMethod_Type[64], PyModule_Type[64],
    PyProperty_Type[64], PySet_Type[64], PySlice_Type[64], PyStaticMethod_Type[64], PyTuple_Type[64], PyType_Type[64],
    PyUnicode_Type[64], PyExc_AttributeError[64], PyExc_BufferError[64], PyExc_ImportError[64], PyExc_IndexError[64],
    PyExc_KeyError[64], PyExc_MemoryError[64], PyExc_NotImplementedError[64], PyExc_OverflowError[64],
    PyExc_RuntimeError[64], PyExc_StopIteration[64], PyExc_SystemError[64], PyExc_TypeError[64], PyExc_ValueError[64];

// Functions whose addresses it takes when it is loaded.
NYBBLE_ABSENT void PyObject_GenericGetDict() { __builtin_trap(); }
NYBBLE_ABSENT void PyObject_GenericSetDict() { __builtin_trap(); }

}  // extern "C"
