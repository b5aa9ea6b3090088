// SPDX-License-Identifier: MIT
// Checks of a kernel's tensors: each raises ValueError naming op and argument. Knows no kernel.
//
// Shapes and types are checked once; what depends on values in memory goes through `check_values`,
// so that a replayed step is checked as well. Kernels go through `run`. Neither may read a value
// out of a tensor beforehand: at replay it would be an old one.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "dlpack_tensor.h"
#include "kernels.h"
#include "recording.h"

namespace tokenspeed::cpu {

// Each adds the functions of its file.
void bind_attention(nanobind::module_& m);
void bind_elementwise(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_moe(nanobind::module_& m);
void bind_recording(nanobind::module_& m);

using python::Tensor;
using python::Type;

// The op whose arguments this thread checks.
inline thread_local const char* checked_op = "";
class OpScope {
  public:
    explicit OpScope(const char* op) : before_(checked_op) { checked_op = op; }
    ~OpScope() { checked_op = before_; }
    OpScope(const OpScope&) = delete;
    OpScope& operator=(const OpScope&) = delete;

  private:
    const char* before_;
};

[[noreturn]] inline void refuse(const char* name, const std::string& why) {
    const std::string op = *checked_op == 0 ? "" : std::string(checked_op) + ": ";
    throw std::invalid_argument(op + name + ": " + why);
}

// The function in Python, with what it refuses in the op's name.
template <typename Result, typename... Arguments, typename... Extra>
void def_op(nanobind::module_& m, const char* op, Result (*function)(Arguments...),
            const Extra&... extra) {
    const auto named = [op, function](Arguments... arguments) -> Result {
        const OpScope scope(op);
        return function(static_cast<Arguments&&>(arguments)...);
    };
    m.def(op, named, extra...);
}

// A failure's text is composed only when it is needed: these run in every call.
inline void expect(bool holds, const char* name, const char* why) {
    if (!holds) refuse(name, why);
}

inline constexpr int64_t kAny = -1;

// The tensor has these sizes (kAny: whatever it has) and is dense from axis `dense_from` on.
inline void expect_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes,
                         int dense_from = 0) {
    bool matches = t.ndim() == static_cast<int>(sizes.size());
    int axis = 0;
    for (const int64_t size : sizes) {
        matches = matches && (size == kAny || t.size(axis) == size);
        ++axis;
    }
    if (!matches) {
        std::string wanted;
        for (const int64_t size : sizes) {
            wanted += wanted.empty() ? "" : ", ";
            wanted += size == kAny ? "any" : std::to_string(size);
        }
        refuse(name, "expected shape [" + wanted + "], got " + t.shape_text());
    }
    expect(t.dense_from(dense_from), name, "must be contiguous");
}

inline void expect_type(const Tensor& t, const char* name, const Type& type) {
    if (!t.is(type)) refuse(name, std::string("expected ") + type.name + ", got " + t.type_text());
}

inline DType float_type(const Tensor& t, const char* name) {
    if (t.is(python::kFloat32)) return DType::kFloat32;
    if (t.is(python::kBFloat16)) return DType::kBFloat16;
    refuse(name, "expected float32 or bfloat16, got " + t.type_text());
}

inline void expect_same(const Tensor& t, const char* name, DType dtype) {
    expect(float_type(t, name) == dtype, name, "its dtype differs from the first argument's");
}

// `check(params)` throws what is wrong with values in memory; together they own all it needs but
// that memory.
template <typename Params, typename Check>
void check_values(const Params& params, Check check) {
    perform(params, [check, op = checked_op](const Params& now) {
        const OpScope scope(op);
        check(now);
    });
}

// Values in [0, below), one for each of a step's tokens, or of its rows.
enum class Axis { kTokens, kRows };

template <typename T>
struct Indices {
    const T* values;
    int64_t count, below;
    const char* name;
    Axis axis;
};

template <typename T>
bool resize(Indices<T>& indices, const StepSize& from, const StepSize& to) {
    const bool of_rows = indices.axis == Axis::kRows;
    if (indices.count != (of_rows ? from.num_rows : from.num_tokens)) return false;
    indices.count = of_rows ? to.num_rows : to.num_tokens;
    return true;
}

template <typename T>
const T* indices(const Tensor& t, const char* name, const Type& type, Axis axis, int64_t count,
                 int64_t below) {
    expect_type(t, name, type);
    expect_shape(t, name, {count});
    const Indices<T> indices{t.data<T>(), count, below, name, axis};
    check_values(indices, [](const Indices<T>& now) {
        bool inside = true;
        for (int64_t i = 0; i < now.count; ++i) {
            inside &= now.values[i] >= 0 && now.values[i] < now.below;
        }
        if (!inside) {
            refuse(now.name, "an index is not in [0, " + std::to_string(now.below) + ")");
        }
    });
    return indices.values;
}

template <typename T>
const T* vector_of(const Tensor& t, const char* name, const Type& type, int64_t count) {
    expect_type(t, name, type);
    expect_shape(t, name, {count});
    return t.data<T>();
}

template <typename Params>
void run(void (*kernel)(const Params&), const Params& params) {
    nanobind::gil_scoped_release released;
    perform(params, kernel);
}

}  // namespace tokenspeed::cpu
