"""An operator that ONNX does not have, com.acme's Cube (y = x³), as a real custom-op library of ONNX Runtime."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import onnx
import pytest
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from pathlib import Path

# The wheel of ONNX Runtime brings no headers. What is used of its C API is laid out as onnxruntime_c_api.h has it,
# where entries are only ever added at the end: the places of functions in OrtApi, and OrtCustomOp as of version 8.
_SOURCE = """
#include <stddef.h>
#include <stdint.h>
typedef struct { const void *const *(*get)(uint32_t); const char *(*version)(void); } ApiBase;
enum { CREATE_DOMAIN = 26, DOMAIN_ADD = 27, ADD_DOMAIN = 28, DATA = 51, RANK = 61, DIMENSIONS = 62, ELEMENTS = 64,
       SHAPE = 65, INPUT = 90, OUTPUT = 91 };
static const void *const *api;
#define CALL(place, ...) ((void *(*)())api[place])(__VA_ARGS__)
typedef struct Op {
  uint32_t version;
  void *(*create)(const struct Op *, const void *, const void *);
  const char *(*name)(const struct Op *);
  const char *(*provider)(const struct Op *);
  int (*input_type)(const struct Op *, size_t);
  size_t (*inputs)(const struct Op *);
  int (*output_type)(const struct Op *, size_t);
  size_t (*outputs)(const struct Op *);
  void (*compute)(void *, void *);
  void (*destroy)(void *);
  int (*input_kind)(const struct Op *, size_t);
  int (*output_kind)(const struct Op *, size_t);
} Op;
static void *create(const Op *op, const void *a, const void *i) { return (void *)op; }
static const char *name(const Op *op) { return "Cube"; }
static const char *provider(const Op *op) { return 0; }
static int float_type(const Op *op, size_t i) { return 1; }
static size_t one(const Op *op) { return 1; }
static int required(const Op *op, size_t i) { return 0; }
static void destroy(void *kernel) {}
static void compute(void *kernel, void *context) {
  const void *in; void *out, *info; float *x, *y; size_t rank, count; int64_t sizes[8];
  CALL(INPUT, context, (size_t)0, &in); CALL(SHAPE, in, &info); CALL(RANK, info, &rank);
  CALL(DIMENSIONS, info, sizes, rank); CALL(ELEMENTS, info, &count);
  CALL(OUTPUT, context, (size_t)0, sizes, rank, &out); CALL(DATA, in, &x); CALL(DATA, out, &y);
  for (size_t i = 0; i < count; i++) y[i] = x[i] * x[i] * x[i];
}
static Op op = {8, create, name, provider, float_type, one, float_type, one, compute, destroy, required, required};
void *RegisterCustomOps(void *options, const ApiBase *base) {
  void *domain;
  api = base->get(8);
  CALL(CREATE_DOMAIN, "com.acme", &domain);
  CALL(DOMAIN_ADD, domain, &op);
  return CALL(ADD_DOMAIN, options, domain);
}
"""


def library(folder: Path) -> Path:
    """The library, compiled into `folder`; skips where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a custom-op library with")
    source, target = folder / "cube.c", folder / "libcube.so"
    source.write_text(_SOURCE)
    # std=gnu17: C23 reads () as "no arguments".
    subprocess.run([compiler, "-std=gnu17", "-shared", "-fPIC", "-w", source, "-o", target], check=True)
    return target


def model() -> onnx.ModelProto:
    """x [2, 4] → Cube → MatMul with the identity, times 2 → y."""
    nodes = [
        helper.make_node("Cube", ["x"], ["c"], name="cube", domain="com.acme"),
        helper.make_node("MatMul", ["c", "w"], ["y"], name="matmul"),
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [2.0 * (i % 5 == 0) for i in range(16)])
    graph = helper.make_graph(
        nodes,
        "cube",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [weight],
        value_info=[helper.make_tensor_value_info("c", TensorProto.FLOAT, [2, 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
