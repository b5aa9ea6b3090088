// SPDX-License-Identifier: MIT
// A packed weight as a Python object, and what the bindings that take one check of it.
#pragma once

#include <nanobind/nanobind.h>

#include "cpu_arguments.h"

namespace tokenspeed::cpu {

// A weight in panels and the tensor [count, bytes_each] that holds it.
struct Packed {
    PackedWeight weight;
    int ndim;
    nanobind::object data;

    nanobind::tuple shape() const {
        if (ndim == 2) return nanobind::make_tuple(weight.out, weight.in);
        return nanobind::make_tuple(weight.count, weight.out, weight.in);
    }
};

}  // namespace tokenspeed::cpu
