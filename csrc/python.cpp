// The module lbg._C: what Python asks of the launcher layer besides the operators, in Python's limited API.
//
// Only functions of Python are referenced, no data such as PyExc_RuntimeError: they bind on first call, so that a C++
// program without Python can load this library for its operators. Failures return as text and are raised in Python.
#include <cstdio>
#include <string>

#include "lbg.h"
#include "ops.h"
#include "python_abi.h"

namespace {

using lbg::Config;
using lbg::Problem;

PyObject* string(const std::string& text) {
  return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
}

// Everything below prints as JSON, which Python reads: plain numbers, booleans and texts with no quotes in them.
std::string json(const Config& c) {
  const auto field = [](const char* name, const std::string& value) {
    return ", \"" + std::string(name) + "\": " + value;
  };
  const auto number = [&](const char* name, double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return field(name, text);
  };
  const auto quoted = [](const char* text) { return "\"" + std::string(text) + "\""; };
  const auto boolean = [](bool value) { return std::string(value ? "true" : "false"); };
  return "{\"symbol\": " + quoted(c.symbol) + number("arch", c.arch) + number("compiled_arch", c.compiled_arch) +
         field("x", quoted(lbg::name(c.x))) + field("weight", quoted(lbg::name(c.weight))) +
         field("out", quoted(lbg::name(c.out))) + field("fp16_accumulate", boolean(c.fp16_accumulate)) +
         field("row_major", boolean(c.row_major)) + field("aligned", boolean(c.aligned)) +
         field("out_aligned", boolean(c.out_aligned)) + field("tma", boolean(c.tma)) +
         field("persistent", boolean(c.persistent)) + number("tile_m", c.tile_m) + number("tile_n", c.tile_n) +
         number("tile_k", c.tile_k) + number("warps", c.warps) + number("stages", c.stages) +
         number("cluster", c.cluster) + number("pieces", c.pieces) + number("shared_bytes", c.shared_bytes) +
         number("registers", c.registers) + number("ctas_per_sm", c.ctas_per_sm) +
         number("launch_us", c.cost.launch_us) + number("wave_us", c.cost.wave_us) + number("step_us", c.cost.step_us) +
         number("latency_us", c.cost.latency_us) + number("crowd_us", c.cost.crowd_us) +
         number("off32_us", c.cost.off32_us) + number("off64_us", c.cost.off64_us) +
         number("off128_us", c.cost.off128_us) + number("dram_bytes_per_us", c.cost.dram_bytes_per_us) + "}";
}

PyObject* configs(PyObject*, PyObject*) {
  std::string text = "[";
  for (int32_t i = 0; i < lbg::kConfigCount; ++i) text += (i ? ", " : "") + json(lbg::kConfigs[i]);
  return string(text + "]");
}

// One entry a config, in table order: [predicted microseconds or null, why it cannot run or null, chosen].
PyObject* explain(PyObject*, PyObject* args) {
  int x = 0, weight = 0, out = 0, fp16_accumulate = 0, aligned = 0, full_rate = 0;
  lbg::Chip chip{};
  Problem p{};
  if (!PyArg_ParseTuple(args, "iiii(LLL)(LLLLLLLL)iiii", &x, &weight, &out, &fp16_accumulate, &p.m, &p.n, &p.k,
                        &p.stride_xm, &p.stride_xk, &p.stride_wn, &p.stride_wk, &p.stride_scale, &p.stride_shift,
                        &p.stride_om, &p.stride_on, &aligned, &chip.arch, &chip.sm_count, &full_rate)) {
    return nullptr;
  }
  p.x = static_cast<lbg::DType>(x);
  p.weight = static_cast<lbg::DType>(weight);
  p.out = static_cast<lbg::DType>(out);
  p.fp16_accumulate = fp16_accumulate != 0;
  chip.full_rate = full_rate != 0;
  p = lbg::normalised(p);
  const lbg::Alignment pointers{aligned != 0, true};  // a new result starts on 16 bytes
  const Config* chosen = lbg::choose(p, pointers, chip);
  std::string text = "[";
  for (int32_t i = 0; i < lbg::kConfigCount; ++i) {
    const Config& config = lbg::kConfigs[i];
    const char* reason = lbg::why_not(config, p, pointers, chip);
    const std::string us = reason ? "null" : std::to_string(lbg::predicted_us(config, p, chip));
    const std::string why = reason ? "\"" + std::string(reason) + "\"" : "null";
    text += (i ? ", [" : "[") + us + ", " + why + ", " + (&config == chosen ? "true]" : "false]");
  }
  return string(text + "]");
}

// (error, name, arch, SM count, whether of full rate) of a GPU
PyObject* gpu(PyObject*, PyObject* args) {
  int device = 0;
  if (!PyArg_ParseTuple(args, "i", &device)) return nullptr;
  lbg::Gpu gpu{};
  const lbg::Status status = lbg::gpu(device, &gpu);
  return Py_BuildValue("(ssiii)", status.text.c_str(), gpu.name.c_str(), gpu.arch, gpu.sm_count, int{gpu.full_rate});
}

// (error, kernels loaded)
PyObject* warmup(PyObject*, PyObject* args) {
  int device = 0;
  if (!PyArg_ParseTuple(args, "i", &device)) return nullptr;
  int32_t loaded = 0;
  const lbg::Status status = lbg::warmup(device, &loaded);
  return Py_BuildValue("(si)", status.text.c_str(), loaded);
}

// The error, if the symbol is unknown; an empty symbol ends the override.
PyObject* set_override(PyObject*, PyObject* args) {
  const char* symbol = nullptr;
  if (!PyArg_ParseTuple(args, "s", &symbol)) return nullptr;
  return string(lbg::set_override(symbol).text);
}

PyObject* get_override(PyObject*, PyObject*) { return string(lbg::get_override()); }

PyObject* registration_error(PyObject*, PyObject*) { return string(lbg::registration_error()); }

PyMethodDef methods[] = {{"configs", configs, METH_NOARGS, nullptr},
                         {"explain", explain, METH_VARARGS, nullptr},
                         {"gpu", gpu, METH_VARARGS, nullptr},
                         {"warmup", warmup, METH_VARARGS, nullptr},
                         {"set_override", set_override, METH_VARARGS, nullptr},
                         {"get_override", get_override, METH_NOARGS, nullptr},
                         {"registration_error", registration_error, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {1,  nullptr, nullptr, 0,       nullptr, "lbg._C", nullptr,
                          -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* module = PyModule_Create2(&definition, PYTHON_ABI_VERSION);
  if (module) PyModule_AddStringConstant(module, "version", lbg::kVersion);
  return module;
}
