// SPDX-License-Identifier: MIT
// Shared memory for Python: arguments checked, the interpreter's lock given away while waiting.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "dlpack_tensor.h"
#include "group.h"
#include "ring.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::shm {
namespace {

using python::Tensor;
using Sizes = std::vector<int64_t>;

constexpr python::Type kFloat64{2, 64, "float64"};

// Lets Python's signal handlers run while a call waits: Ctrl-C ends it.
void on_tick() {
    nb::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

std::chrono::nanoseconds nanoseconds(double seconds) {
    if (!(seconds >= 0 && seconds < 1e8)) throw std::invalid_argument("timeout_s: out of range");
    return std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9));
}

void expect(bool condition, const std::string& what) {
    if (!condition) throw std::invalid_argument(what);
}

DType sum_type(const Tensor& x) {
    if (x.is(kFloat64)) return DType::kFloat64;
    if (x.is(python::kFloat32)) return DType::kFloat32;
    if (x.is(python::kBFloat16)) return DType::kBFloat16;
    if (x.is(python::kInt64)) return DType::kInt64;
    if (x.is(python::kInt32)) return DType::kInt32;
    throw std::invalid_argument("sums take float64, float32, bfloat16, int64 and int32");
}

int64_t count(const Tensor& x) {
    int64_t product = 1;
    for (int axis = 0; axis < x.ndim(); ++axis) product *= x.size(axis);
    return product;
}

int64_t num_bytes(const Tensor& x) {
    expect(count(x) == 0 || x.dense_from(0), "the tensor must be contiguous: " + x.shape_text());
    return count(x) * x.element_bytes();
}

int member(const Group& group, int index) {
    expect(index >= 0 && index < group.size() && index != group.index(),
           "no other member of the group: " + std::to_string(index));
    return index;
}

// `x` is cut along `dim` into `sizes`, or, where `whole` is false, is this rank's piece.
Pieces pieces_of(const Group& group, const Tensor& x, int dim, const Sizes& sizes, bool whole) {
    expect(dim >= 0 && dim < x.ndim(), "dim out of range");
    expect(static_cast<int>(sizes.size()) == group.size(), "one size for each rank is needed");
    Pieces pieces{1, sizes, x.element_bytes()};
    for (int axis = 0; axis < dim; ++axis) pieces.outer *= x.size(axis);
    for (int axis = dim + 1; axis < x.ndim(); ++axis) pieces.inner *= x.size(axis);
    for (const int64_t size : sizes) expect(size >= 0, "sizes must not be negative");
    expect(x.size(dim) == (whole ? pieces.total() : sizes[group.index()]),
           "sizes do not fit " + x.shape_text());
    return pieces;
}

void expect_bytes(const Tensor& out, int64_t bytes) {
    expect(num_bytes(out) == bytes, "out has the wrong size: " + out.shape_text());
}

void all_reduce(Group& group, Tensor& x) {
    const DType dtype = sum_type(x);
    num_bytes(x);
    nb::gil_scoped_release released;
    group.all_reduce(dtype, count(x), x.data<std::byte>());
}

void all_gather(Group& group, const Tensor& x, Tensor& out, int dim, const Sizes& sizes) {
    num_bytes(x);
    const Pieces pieces = pieces_of(group, x, dim, sizes, false);
    expect_bytes(out, pieces.outer * pieces.total() * pieces.inner);
    nb::gil_scoped_release released;
    group.all_gather(pieces, x.data<std::byte>(), out.data<std::byte>());
}

void reduce_scatter(Group& group, const Tensor& x, Tensor& out, int dim, const Sizes& sizes) {
    const DType dtype = sum_type(x);
    num_bytes(x);
    const Pieces pieces = pieces_of(group, x, dim, sizes, true);
    expect_bytes(out, pieces.outer * sizes[group.index()] * pieces.inner);
    nb::gil_scoped_release released;
    group.reduce_scatter(dtype, pieces, x.data<std::byte>(), out.data<std::byte>());
}

void all_to_all(Group& group, const Tensor& x, Tensor& out, const Sizes& send,
                const Sizes& receive) {
    num_bytes(x);
    const Pieces from = pieces_of(group, x, 0, send, true);
    const Pieces to = pieces_of(group, out, 0, receive, true);
    expect(from.inner == to.inner, "x and out have rows of different sizes");
    num_bytes(out);
    Sizes send_bytes = send, receive_bytes = receive;
    for (int64_t& size : send_bytes) size *= from.inner;
    for (int64_t& size : receive_bytes) size *= to.inner;
    nb::gil_scoped_release released;
    group.all_to_all(send_bytes, x.data<std::byte>(), receive_bytes, out.data<std::byte>());
}

void broadcast(Group& group, Tensor& x, int root) {
    const int64_t bytes = num_bytes(x);
    expect(root >= 0 && root < group.size(), "root is no member of the group");
    nb::gil_scoped_release released;
    group.broadcast(bytes, root, x.data<std::byte>());
}

void send(Group& group, const Tensor& x, int to) {
    const int64_t bytes = num_bytes(x);
    member(group, to);
    nb::gil_scoped_release released;
    group.send(bytes, to, x.data<std::byte>());
}

void receive(Group& group, Tensor& x, int source) {
    const int64_t bytes = num_bytes(x);
    member(group, source);
    nb::gil_scoped_release released;
    group.receive(bytes, source, x.data<std::byte>());
}

std::unique_ptr<Group> make_group(const std::string& name, const std::vector<int>& ranks, int index,
                                  double timeout_s, const Group* parent) {
    const auto timeout = nanoseconds(timeout_s);
    const Members* const others = parent == nullptr ? nullptr : &parent->members();
    nb::gil_scoped_release released;
    return std::make_unique<Group>(name, ranks, index, timeout, others, on_tick);
}

// ---- The ring ----------------------------------------------------------------------------------

std::unique_ptr<Ring> ring_writer(const std::string& name, int readers, size_t capacity,
                                  double timeout_s) {
    return Ring::write(name, readers, capacity, nanoseconds(timeout_s), on_tick);
}

std::unique_ptr<Ring> ring_reader(const std::string& name, int readers, int reader, size_t capacity,
                                  double timeout_s) {
    const auto timeout = nanoseconds(timeout_s);
    nb::gil_scoped_release released;
    return Ring::read(name, readers, reader, capacity, timeout, on_tick);
}

void ring_send(Ring& ring, nb::handle data) {
    Py_buffer view;
    if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
    const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> owner(&view, PyBuffer_Release);
    nb::gil_scoped_release released;
    ring.send(static_cast<const std::byte*>(view.buf), static_cast<uint64_t>(view.len));
}

nb::object ring_receive(Ring& ring, double timeout_s) {
    const auto deadline = Clock::now() + nanoseconds(timeout_s);
    uint64_t bytes = 0;
    {
        nb::gil_scoped_release released;
        if (!ring.next(deadline, &bytes)) bytes = UINT64_MAX;
    }
    if (bytes == UINT64_MAX) return nb::none();
    PyObject* const message = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes));
    if (message == nullptr) throw nb::python_error();
    nb::object result = nb::steal(message);
    nb::gil_scoped_release released;
    ring.receive(reinterpret_cast<std::byte*>(PyBytes_AS_STRING(message)), bytes);
    return result;
}

}  // namespace
}  // namespace tokenspeed::shm

NB_MODULE(_shm, m) {
    using namespace tokenspeed::shm;
    // Never released: an exception may be thrown while the interpreter ends.
    nb::object error = nb::module_::import_("tokenspeed.errors").attr("RankDiedError");
    nb::register_exception_translator(
        [](const std::exception_ptr& thrown, void* type) {
            try {
                std::rethrow_exception(thrown);
            } catch (const RankDied& died) {
                PyErr_SetString(static_cast<PyObject*>(type), died.what());
            }
        },
        error.release().ptr());
    nb::class_<Group>(m, "Group")
        .def(nb::new_(&make_group), "name"_a, "ranks"_a, "index"_a, "timeout_s"_a,
             "parent"_a.none())
        .def("all_reduce", &all_reduce, "x"_a)
        .def("all_gather", &all_gather, "x"_a, "out"_a, "dim"_a, "sizes"_a)
        .def("reduce_scatter", &reduce_scatter, "x"_a, "out"_a, "dim"_a, "sizes"_a)
        .def("all_to_all", &all_to_all, "x"_a, "out"_a, "send"_a, "receive"_a)
        .def("broadcast", &broadcast, "x"_a, "root"_a)
        .def("send", &send, "x"_a, "to"_a)
        .def("receive", &receive, "x"_a, "source"_a)
        .def("leave", &Group::leave);
    nb::class_<Ring>(m, "Ring")
        .def_static("write", &ring_writer, "name"_a, "num_readers"_a, "capacity"_a, "timeout_s"_a)
        .def_static("read", &ring_reader, "name"_a, "num_readers"_a, "reader"_a, "capacity"_a,
                    "timeout_s"_a)
        .def("connect", &Ring::connect, nb::call_guard<nb::gil_scoped_release>())
        .def("send", &ring_send, "data"_a)
        .def("receive", &ring_receive, "timeout_s"_a)
        .def("leave", &Ring::leave);
}
