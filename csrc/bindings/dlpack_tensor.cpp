// SPDX-License-Identifier: MIT
#include "dlpack_tensor.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace tokenspeed::python {
namespace dlpack {

const ExchangeApi* api_of(PyTypeObject* type) {
    // Tensor and Parameter in practice. Kept types are never freed, so an address means one type.
    static PyTypeObject* known_types[8];
    static const ExchangeApi* known_apis[8];
    static int known = 0;
    for (int i = 0; i < known; ++i) {
        if (known_types[i] == type) return known_apis[i];
    }
    const auto capsule = nanobind::steal<nanobind::object>(
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
    const void* const pointer =
        capsule.is_valid() ? PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api") : nullptr;
    PyErr_Clear();
    const auto* const api = static_cast<const ExchangeApi*>(pointer);
    if (api == nullptr || api->major != 1) return nullptr;
    if (known < 8) {
        Py_INCREF(reinterpret_cast<PyObject*>(type));
        known_types[known] = type;
        known_apis[known++] = api;
    }
    return api;
}

}  // namespace dlpack

namespace {

// What an importer gets of a tensor in a `Memory`.
struct Placed {
    static constexpr int kMaxAxes = 8;

    dlpack::Managed managed{};
    int64_t shape[kMaxAxes], strides[kMaxAxes];
    std::shared_ptr<void> block;

    Placed(const dlpack::View& prototype, Memory& memory) : Placed(prototype) {
        size_t bytes = prototype.dtype.bits / 8;
        for (int axis = 0; axis < prototype.ndim; ++axis) bytes *= shape[axis];
        block = memory.take(bytes);
        managed.view.data = block.get();
    }

    // Of the prototype's data, which `owner` keeps.
    Placed(const dlpack::View& prototype, std::shared_ptr<void> owner) : Placed(prototype) {
        block = std::move(owner);
    }

  private:
    explicit Placed(const dlpack::View& prototype) {
        for (int axis = prototype.ndim - 1; axis >= 0; --axis) {
            shape[axis] = prototype.shape[axis];
            strides[axis] = axis + 1 == prototype.ndim ? 1 : strides[axis + 1] * shape[axis + 1];
        }
        managed.major = 1;
        managed.context = this;
        managed.deleter = [](dlpack::Managed* held) { delete static_cast<Placed*>(held->context); };
        managed.view = prototype;
        managed.view.shape = shape;
        managed.view.strides = strides;
    }
};

dlpack::Managed* allocate(const dlpack::ExchangeApi& api, dlpack::View& prototype) {
    if (memory_of_new_tensors != nullptr && prototype.ndim <= Placed::kMaxAxes) {
        return &(new Placed(prototype, *memory_of_new_tensors))->managed;
    }
    dlpack::Managed* managed = nullptr;
    const auto set_error = [](void*, const char*, const char* message) {
        PyErr_SetString(PyExc_MemoryError, message);
    };
    if (api.allocate(&prototype, &managed, nullptr, set_error) != 0) {
        throw nanobind::python_error();
    }
    return managed;
}

}  // namespace

bool Tensor::borrow(PyObject* object) {
    api_ = dlpack::api_of(Py_TYPE(object));
    if (api_ == nullptr) return false;
    if (api_->export_view(object, &view_) != 0) {
        PyErr_Clear();
        return false;
    }
    bool empty = false;
    for (int axis = 0; axis < view_.ndim; ++axis) empty |= view_.shape[axis] == 0;
    const bool there = view_.data != nullptr || empty;  // a fake tensor has no memory
    return there && view_.device_type == dlpack::kCpu && view_.strides != nullptr;
}

bool Tensor::dense_from(int first) const {
    int64_t dense = 1;
    for (int axis = ndim() - 1; axis >= first; --axis) {
        if (size(axis) != 1 && stride(axis) != dense) return size(axis) == 0;
        dense *= size(axis);
    }
    return true;
}

std::string Tensor::shape_text() const {
    std::string text = "[";
    for (int axis = 0; axis < ndim(); ++axis) {
        text += (axis != 0 ? ", " : "") + std::to_string(size(axis));
    }
    return text + "]";
}

std::string Tensor::type_text() const {
    for (const Type& type : {kInt32, kInt64, kFloat32, kBFloat16, kBool, kInt8, kUInt8}) {
        if (is(type)) return type.name;
    }
    const char* const kinds[] = {"int", "uint", "float"};
    const std::string bits = std::to_string(view_.dtype.bits);
    return view_.dtype.code < 3 ? kinds[view_.dtype.code] + bits
                                : "another type of " + bits + " bits";
}

Tensor Tensor::empty(std::initializer_list<int64_t> shape) const {
    return make(shape.begin(), static_cast<int>(shape.size()), view_.dtype);
}

Tensor Tensor::empty(std::initializer_list<int64_t> shape, const Type& type) const {
    return make(shape.begin(), static_cast<int>(shape.size()), {type.code, type.bits, 1});
}

Tensor Tensor::empty_like() const { return make(view_.shape, ndim(), view_.dtype); }

Tensor Tensor::make(const int64_t* shape, int ndim, dlpack::DataType dtype) const {
    dlpack::View prototype{};
    prototype.device_type = view_.device_type;
    prototype.device_id = view_.device_id;
    prototype.ndim = ndim;
    prototype.dtype = dtype;
    prototype.shape = const_cast<int64_t*>(shape);
    return imported(allocate(*api_, prototype));
}

Tensor Tensor::with_size(int64_t size, std::shared_ptr<void> owner) const {
    int64_t shape[Placed::kMaxAxes];
    if (ndim() < 1 || ndim() > Placed::kMaxAxes || !dense_from(0)) {
        throw std::invalid_argument("not a contiguous tensor of 1 to 8 axes");
    }
    std::copy_n(view_.shape, ndim(), shape);
    shape[0] = size;
    dlpack::View prototype = view_;
    prototype.shape = shape;
    return imported(&(new Placed(prototype, std::move(owner)))->managed);
}

Tensor Tensor::imported(dlpack::Managed* managed) const {
    void* object = nullptr;
    Tensor result;
    result.api_ = api_;
    result.view_ = managed->view;
    if (api_->import_managed(managed, &object) != 0) throw nanobind::python_error();
    result.owned_ = nanobind::steal<nanobind::object>(static_cast<PyObject*>(object));
    return result;
}

}  // namespace tokenspeed::python
