// The part of Python's limited API (3.10) that python.cpp uses, declared by hand: it is fixed by the stable ABI, and a
// machine that builds lbg then needs no Python headers. Names, layouts and values are CPython's.
#pragma once

#include <cstddef>

extern "C" {

using Py_ssize_t = std::ptrdiff_t;
struct PyObject;
using PyCFunction = PyObject* (*)(PyObject*, PyObject*);

struct PyMethodDef {
  const char* ml_name;
  PyCFunction ml_meth;
  int ml_flags;
  const char* ml_doc;
};

struct PyModuleDef {
  Py_ssize_t ob_refcnt;  // PyModuleDef_HEAD_INIT: 1 and nulls
  void* ob_type;
  void* m_init;
  Py_ssize_t m_index;
  void* m_copy;
  const char* m_name;
  const char* m_doc;
  Py_ssize_t m_size;
  PyMethodDef* m_methods;
  void* m_slots;
  void* m_traverse;
  void* m_clear;
  void* m_free;
};

constexpr int METH_VARARGS = 0x0001;
constexpr int METH_NOARGS = 0x0004;
constexpr int PYTHON_ABI_VERSION = 3;

PyObject* PyModule_Create2(PyModuleDef* definition, int abi_version);
int PyModule_AddStringConstant(PyObject* module, const char* name, const char* value);
PyObject* PyUnicode_FromStringAndSize(const char* text, Py_ssize_t bytes);
int PyArg_ParseTuple(PyObject* args, const char* format, ...);
PyObject* Py_BuildValue(const char* format, ...);
}
