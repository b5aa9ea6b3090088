// SPDX-License-Identifier: MIT
// Recordings for Python. While one is open, every kernel call of this thread is recorded, and its
// results stand in the recording's arena.
#include <nanobind/nanobind.h>

#include <cstddef>
#include <memory>
#include <utility>

#include "cpu_arguments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

struct ArenaMemory : python::Memory {
    explicit ArenaMemory(std::shared_ptr<Arena> of) : arena(std::move(of)) {}
    std::shared_ptr<void> take(size_t bytes) override { return arena->take(bytes); }

    const std::shared_ptr<Arena> arena;
};

struct PyArena {
    std::shared_ptr<Arena> arena = std::make_shared<Arena>();
};

struct PyRecording : Recording {
    explicit PyRecording(const PyArena& memory) : Recording(memory.arena) {}

    PyRecording& enter() {
        if (Recording::open() != nullptr) {
            throw nb::value_error("a recording is open on this thread already");
        }
        Recording::begin(*this);
        python::memory_of_new_tensors = std::make_shared<ArenaMemory>(arena());
        return *this;
    }

    void exit(const nb::args&) {
        if (Recording::open() != this) throw nb::value_error("this recording is not open here");
        python::memory_of_new_tensors.reset();
        Recording::end();
    }
};

}  // namespace

void bind_recording(nb::module_& m) {
    nb::class_<PyArena>(m, "Arena", "Memory of recordings, of which one runs at a time.")
        .def(nb::init<>())
        .def_prop_ro("num_bytes", [](const PyArena& a) { return a.arena->num_bytes(); })
        .def(
            "share",
            [](const PyArena& a, const Tensor& tensor) {
                expect(a.arena->share(tensor.data<void>()), "tensor", "not made in this arena");
            },
            "tensor"_a, "Other recordings may overwrite the tensor from now on.");
    nb::class_<PyRecording>(m, "Recording",
                            "The kernel calls made inside its `with` block, for `replay`.")
        .def(nb::init<const PyArena&>(), "arena"_a)
        .def("__enter__", &PyRecording::enter, nb::rv_policy::reference)
        .def("__exit__", &PyRecording::exit)
        .def_prop_ro("num_calls", [](const PyRecording& r) { return r.num_calls(); })
        .def("replay", [](const PyRecording& r) {
            nb::gil_scoped_release released;
            r.replay();
        });
}

}  // namespace tokenspeed::cpu
