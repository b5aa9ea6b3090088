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

// With room for the results of steps of other sizes.
struct ArenaMemory : python::Memory {
    explicit ArenaMemory(const Recording& of) : recording(of) {}
    std::shared_ptr<void> take(size_t bytes) override {
        return recording.arena()->take(recording.bytes_with_room(bytes));
    }

    const Recording& recording;
};

struct PyArena {
    std::shared_ptr<Arena> arena = std::make_shared<Arena>();
};

struct PyRecording : Recording {
    PyRecording(const PyArena& memory, int64_t num_tokens, int64_t num_rows, int64_t room)
        : Recording(memory.arena, {num_tokens, num_rows}, room) {
        if (num_tokens < 1 || room < num_tokens) {
            throw nb::value_error("there must be a token, and room for all");
        }
    }

    PyRecording& enter() {
        if (Recording::open() != nullptr) {
            throw nb::value_error("a recording is open on this thread already");
        }
        Recording::begin(*this);
        python::memory_of_new_tensors = std::make_shared<ArenaMemory>(*this);
        return *this;
    }

    void exit(const nb::args&) {
        if (Recording::open() != this) throw nb::value_error("this recording is not open here");
        python::memory_of_new_tensors.reset();
        Recording::end();
    }

    void replay_at(int64_t num_tokens, int64_t num_rows) const {
        const StepSize size{num_tokens, num_rows};
        if (!serves(size)) throw nb::value_error("the recording does not serve such a step");
        nb::gil_scoped_release released;
        replay(size);
    }

    // REQUIRES: `result` was made while this was open, and has its tokens on the first axis.
    nb::object with_room(const Tensor& result) const {
        return result.with_size(room(), arena()).object();
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
        .def(nb::init<const PyArena&, int64_t, int64_t, int64_t>(), "arena"_a, "num_tokens"_a,
             "num_rows"_a, "room"_a)
        .def("__enter__", &PyRecording::enter, nb::rv_policy::reference)
        .def("__exit__", &PyRecording::exit)
        .def_prop_ro("num_calls", [](const PyRecording& r) { return r.num_calls(); })
        .def_prop_ro("is_fixed", [](const PyRecording& r) { return r.is_fixed(); })
        .def_prop_ro("room", [](const PyRecording& r) { return r.room(); })
        .def("with_room", &PyRecording::with_room, "result"_a)
        .def("replay", &PyRecording::replay_at, "num_tokens"_a, "num_rows"_a);
}

}  // namespace tokenspeed::cpu
