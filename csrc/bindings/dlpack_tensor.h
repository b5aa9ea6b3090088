// SPDX-License-Identifier: MIT
// A torch tensor (or any that speaks DLPack's C exchange API) as a C++ argument and result. Knows
// memory and layout, no kernel.
//
// The structs below are those of the DLPack specification, version 1.3, in our own words; only what
// is used here is named. `__dlpack_c_exchange_api__` is an attribute of the tensor's type.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

namespace tokenspeed::python {

namespace dlpack {

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct View {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct Managed {
    uint32_t major, minor;
    void* context;
    void (*deleter)(Managed*);
    uint64_t flags;
    View view;
};

struct ExchangeApi {
    uint32_t major, minor;
    void* older;
    int (*allocate)(View* prototype, Managed** out, void* error_context,
                    void (*set_error)(void*, const char*, const char*));
    int (*export_managed)(void* object, Managed** out);
    int (*import_managed)(Managed* tensor, void** out_object);
    int (*export_view)(void* object, View* out);
    int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

inline constexpr int32_t kCpu = 1;

// The API of a tensor type, or null (no Python error is set).
const ExchangeApi* api_of(PyTypeObject* type);

}  // namespace dlpack

struct Type {
    uint8_t code, bits;
    const char* name;
};
inline constexpr Type kInt32{0, 32, "int32"}, kInt64{0, 64, "int64"}, kFloat32{2, 32, "float32"},
    kBFloat16{4, 16, "bfloat16"}, kBool{6, 8, "bool"}, kInt8{0, 8, "int8"}, kUInt8{1, 8, "uint8"};

// Where new tensors stand in place of the framework's own memory.
class Memory {
  public:
    virtual ~Memory() = default;
    virtual std::shared_ptr<void> take(size_t bytes) = 0;
};

// Null unless the thread wants its new tensors in a memory of its own.
inline thread_local std::shared_ptr<Memory> memory_of_new_tensors;

// A borrowed tensor argument, valid during the call; or an owned new one.
class Tensor {
  public:
    // False if `object` is no tensor on a CPU.
    bool borrow(PyObject* object);

    int ndim() const { return view_.ndim; }
    int64_t size(int axis) const { return view_.shape[axis]; }
    int64_t stride(int axis) const { return view_.strides[axis]; }
    int64_t element_bytes() const { return view_.dtype.bits * view_.dtype.lanes / 8; }
    bool is(const Type& type) const {
        return view_.dtype.code == type.code && view_.dtype.bits == type.bits;
    }
    // Whether axes `first` and up lie without gaps in the usual order.
    bool dense_from(int first) const;
    std::string shape_text() const;
    std::string type_text() const;

    template <typename T>
    T* data() const {
        return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
    }

    // New contiguous tensors, uninitialised, made by the framework that this one comes from.
    Tensor empty(std::initializer_list<int64_t> shape) const;
    Tensor empty(std::initializer_list<int64_t> shape, const Type& type) const;
    Tensor empty_like() const;

    // The same memory with `size` on the first axis, contiguous; `owner` keeps it.
    Tensor with_size(int64_t size, std::shared_ptr<void> owner) const;

    // REQUIRES: a tensor that empty() or with_size() made.
    nanobind::object object() const { return owned_; }

  private:
    Tensor make(const int64_t* shape, int ndim, dlpack::DataType dtype) const;
    Tensor imported(dlpack::Managed* managed) const;

    dlpack::View view_{};
    const dlpack::ExchangeApi* api_ = nullptr;
    nanobind::object owned_;
};

}  // namespace tokenspeed::python

namespace nanobind::detail {

template <>
struct type_caster<tokenspeed::python::Tensor> {
    NB_TYPE_CASTER(tokenspeed::python::Tensor, const_name("torch.Tensor"))

    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        return value.borrow(source.ptr());
    }
};

}  // namespace nanobind::detail
