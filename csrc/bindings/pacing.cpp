// SPDX-License-Identifier: MIT
// Python's door to pacing. The scheduler's module takes the object by its base, `Pacer`, which is
// registered here. Checks what pacing requires; decides nothing.
#include "policy/pacing.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenspeed;
using namespace tokenspeed::policy;

namespace {

void expect(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

void make(Pacing* self, const StepTimeModel& times, std::optional<double> tps_floor,
          std::optional<double> max_wait_s, int max_num_seqs, int num_experts,
          int experts_per_token) {
    PacingOptions options;
    if (tps_floor.has_value()) {
        expect(*tps_floor > 0 && *tps_floor <= kMostFloor, "tps_floor: must be in (0, 10000]");
        options.tps_floor = *tps_floor;
    }
    if (max_wait_s.has_value()) {
        expect(*max_wait_s >= 0 && std::isfinite(*max_wait_s), "max_wait_s: must be >= 0");
        options.max_wait_s = *max_wait_s;
    }
    expect(max_num_seqs >= 1, "max_num_seqs: must be at least 1");
    expect(experts_per_token >= 0 && experts_per_token <= num_experts,
           "experts_per_token: must be in [0, num_experts]");
    options.max_num_seqs = max_num_seqs;
    options.experts = {num_experts, experts_per_token};
    new (self) Pacing(&times, options);
}

using View = std::tuple<uint64_t, double, int64_t, double, bool>;

std::vector<View> streams(const Pacing& self) {
    std::vector<View> views;
    for (const StreamView& s : self.streams()) {
        views.emplace_back(s.id, s.tps_floor, s.num_tokens, s.ahead_s, s.runs);
    }
    return views;
}

using Ids = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rates = nb::ndarray<nb::numpy, double, nb::ndim<1>>;

std::pair<Rates, double> least_rates(const Pacing& self, const Ids& ids) {
    const std::vector<double> rates = self.least_rates({ids.data(), ids.size()});
    auto* data = new double[rates.size()];
    std::ranges::copy(rates, data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<double*>(p); });
    return {Rates(data, {ids.size()}, owner), rates.back()};
}

}  // namespace

void bind_pacing(nb::module_& m);

void bind_pacing(nb::module_& m) {
    nb::class_<Pacer>(m, "Pacer");
    nb::class_<Pacing, Pacer>(m, "Pacing")
        .def("__init__", make, "times"_a, nb::kw_only(), "tps_floor"_a.none() = nb::none(),
             "max_wait_s"_a.none() = nb::none(), "max_num_seqs"_a, "num_experts"_a = 0,
             "experts_per_token"_a = 0, nb::keep_alive<1, 2>())
        .def("predicted_wait_s", &Pacing::predicted_wait_s, "request_id"_a)
        .def("hopeless", &Pacing::hopeless, "request_id"_a)
        .def("retry_after_s", &Pacing::retry_after_s, "request_id"_a)
        .def("overdue", &Pacing::overdue)
        .def("least_rates", least_rates, "request_ids"_a.noconvert())
        .def("streams", streams)
        .def_prop_ro("budget_s", &Pacing::budget_s)
        .def_prop_ro("num_behind", &Pacing::num_behind)
        .def_prop_ro("num_forced", &Pacing::num_forced)
        .def_prop_ro("num_late", &Pacing::num_late)
        .def_prop_ro("num_unmeetable", &Pacing::num_unmeetable)
        .def_prop_ro("last_unmeetable", &Pacing::last_unmeetable);
}
