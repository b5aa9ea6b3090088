// SPDX-License-Identifier: MIT
// Python's door to the policy: arrays in, arrays out. Checks what the policy requires; decides
// nothing.
#include "policy/policy.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenspeed::policy;

namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Triples = nb::ndarray<const int32_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Owned = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

void expect(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

template <class T>
std::span<const T> view(const Vector<T>& array) {
    return {array.data(), array.size()};
}

Features features(const Vector<double>& array) {
    expect(array.size() == kNumFeatures, "features: expected one value for each of FEATURES");
    Features result;
    std::ranges::copy(view(array), result.begin());
    return result;
}

Features amounts(const Vector<double>& array) {
    const Features result = features(array);
    expect(std::ranges::all_of(result, [](double x) { return std::isfinite(x) && x >= 0; }),
           "features: must be finite and >= 0");
    return result;
}

template <class T>
Owned<T> owned(std::span<const T> values) {
    auto* data = new T[std::max<size_t>(values.size(), 1)];
    std::ranges::copy(values, data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Owned<T>(data, {values.size()}, owner);
}

// ---- Step times --------------------------------------------------------------------------------

void make_times(StepTimeModel* self, const std::optional<Vector<double>>& prior, double forgetting,
                double prior_weight) {
    StepTimeOptions options;
    if (prior.has_value()) options.prior = amounts(*prior);
    expect(std::ranges::any_of(options.prior, [](double x) { return x > 0; }),
           "prior: something must cost time");
    expect(forgetting > 0 && forgetting <= 1, "forgetting: must be in (0, 1]");
    expect(prior_weight > 0 && std::isfinite(prior_weight), "prior_weight: must be > 0");
    options.forgetting = forgetting;
    options.prior_weight = prior_weight;
    new (self) StepTimeModel(options);
}

bool observe_time(StepTimeModel& self, const Vector<double>& x, double seconds) {
    return self.observe(features(x), seconds);
}

std::pair<double, double> predict(const StepTimeModel& self, const Vector<double>& x) {
    const Prediction prediction = self.predict(amounts(x));
    return {prediction.seconds, prediction.stddev};
}

// ---- Acceptance --------------------------------------------------------------------------------

void make_acceptance(Acceptance* self, int num_drafters, double prior, double request_memory,
                     double shared_memory, double shared_shrinkage) {
    expect(num_drafters >= 1 && num_drafters <= 64, "num_drafters: must be in [1, 64]");
    expect(prior > 0 && prior < 1, "prior: must be in (0, 1)");
    expect(request_memory >= 1, "request_memory: must be at least 1");
    expect(shared_memory >= 1, "shared_memory: must be at least 1");
    expect(shared_shrinkage > 0, "shared_shrinkage: must be > 0");
    new (self) Acceptance({num_drafters, prior, request_memory, shared_memory, shared_shrinkage});
}

void check_drafters(const Acceptance& self, std::span<const int32_t> drafters) {
    expect(std::ranges::all_of(drafters, [&](int d) { return d >= 0 && d < self.num_drafters(); }),
           "drafters: out of range");
}

void observe_drafts(Acceptance& self, const Vector<uint64_t>& request_ids,
                    const Vector<int32_t>& drafters, const Vector<int32_t>& match_lens,
                    const Vector<int32_t>& hits, const Vector<bool>& missed) {
    const size_t size = request_ids.size();
    expect(drafters.size() == size && match_lens.size() == size && hits.size() == size &&
               missed.size() == size,
           "all arrays must have the same length");
    check_drafters(self, view(drafters));
    expect(std::ranges::all_of(view(hits), [](int n) { return n >= 0; }), "hits: must be >= 0");
    for (size_t i = 0; i < size; ++i) {
        self.observe(request_ids.data()[i], drafters.data()[i], match_lens.data()[i],
                     std::min(hits.data()[i], DepthPolicy::kMostDepth), missed.data()[i]);
    }
}

double rate(const Acceptance& self, uint64_t request_id, int drafter, int match_len, int place) {
    check_drafters(self, {&drafter, 1});
    expect(place >= 0, "place: must be >= 0");
    return self.rate(request_id, drafter, match_len, place);
}

// ---- Depths ------------------------------------------------------------------------------------

Experts experts(int count, int per_token) {
    expect(per_token >= 0 && per_token <= count, "experts_per_token: must be in [0, num_experts]");
    return {count, per_token};
}

double experts_touched(double num_tokens, int count, int per_token) {
    return experts(count, per_token).touched(num_tokens);
}

std::span<const double> view_floors(const std::optional<Vector<double>>& floors, size_t size,
                                    double floor_of_others) {
    const auto fits = [](double floor) { return std::isfinite(floor) && floor >= 0; };
    expect(fits(floor_of_others), "floor_of_others: must be finite and >= 0");
    if (!floors.has_value()) return {};
    expect(floors->size() == size, "floors: expected one for each row");
    expect(std::ranges::all_of(view(*floors), fits), "floors: must be finite and >= 0");
    return view(*floors);
}

void check_depths(const Vector<int32_t>& max_depths) {
    expect(std::ranges::all_of(view(max_depths), [](int n) { return n >= 0; }),
           "max_depths: must be >= 0");
}

Owned<int32_t> best_depths(const StepTimeModel& times, const Vector<double>& base,
                           const Table& rates, const Vector<int32_t>& max_depths,
                           const Vector<bool>& proposes, int64_t max_drafts, int num_experts,
                           int experts_per_token, const std::optional<Vector<double>>& floors,
                           double floor_of_others) {
    const size_t size = rates.shape(0), width = rates.shape(1);
    expect(max_depths.size() == size && proposes.size() == size,
           "rates, max_depths and proposes must have the same length");
    check_depths(max_depths);
    const auto asked = view_floors(floors, size, floor_of_others);
    std::vector<double> probabilities(rates.data(), rates.data() + size * width);
    std::vector<DraftRow> rows;
    for (size_t i = 0; i < size; ++i) {
        const std::span all(probabilities);
        const auto own = all.subspan(i * width, std::min<size_t>(width, max_depths.data()[i]));
        for (size_t j = 0; j < own.size(); ++j) {
            expect(own[j] >= 0 && own[j] <= 1, "rates: must be in [0, 1]");
            if (j > 0) own[j] *= own[j - 1];
        }
        rows.push_back({own, proposes.data()[i], asked.empty() ? 0 : asked[i]});
    }
    std::vector<int32_t> depths(size);
    const DraftCosts costs(times, amounts(base), experts(num_experts, experts_per_token));
    choose_depths(costs, rows, max_drafts, depths, floor_of_others);
    return owned<int32_t>(depths);
}

void make_policy(DepthPolicy* self, const StepTimeModel& times, Acceptance& acceptance,
                 int num_experts, int experts_per_token) {
    new (self) DepthPolicy(&times, &acceptance, experts(num_experts, experts_per_token));
}

std::span<const Rival> view_rivals(const std::optional<Triples>& rivals, size_t size,
                                   const Acceptance& acceptance) {
    if (!rivals.has_value()) return {};
    expect(rivals->shape(0) == size, "rivals: expected one for each row");
    static_assert(sizeof(Rival) == 3 * sizeof(int32_t));
    const std::span all(reinterpret_cast<const Rival*>(rivals->data()), size);
    expect(std::ranges::all_of(all,
                               [&](const Rival& r) {
                                   return r.drafter >= 0 && r.drafter < acceptance.num_drafters() &&
                                          r.depth >= 0;
                               }),
           "rivals: out of range");
    return all;
}

Owned<int32_t> choose(DepthPolicy& self, const Vector<double>& base,
                      const Vector<uint64_t>& request_ids, const Vector<int32_t>& drafters,
                      const Vector<int32_t>& match_lens, const Vector<int32_t>& max_depths,
                      const Vector<bool>& proposes, int64_t max_drafts,
                      const std::optional<Triples>& rivals,
                      const std::optional<Vector<double>>& floors, double floor_of_others) {
    const size_t size = request_ids.size();
    expect(drafters.size() == size && match_lens.size() == size && max_depths.size() == size &&
               proposes.size() == size,
           "all arrays must have the same length");
    check_drafters(self.acceptance(), view(drafters));
    check_depths(max_depths);
    std::vector<int32_t> depths(size);
    self.choose(amounts(base),
                {view(request_ids), view(drafters), view(match_lens), view(max_depths),
                 view(proposes), view_rivals(rivals, size, self.acceptance()),
                 view_floors(floors, size, floor_of_others), floor_of_others},
                max_drafts, depths);
    return owned<int32_t>(depths);
}

}  // namespace

void bind_pacing(nb::module_& m);  // pacing.cpp

NB_MODULE(_policy, m) {
    m.attr("FEATURES") = nb::make_tuple(
        "step", "decode_rows", "verify_tokens", "prefill_tokens", "context_thousands", "experts",
        "propose_tokens", "verifies", "propose_depth", "prefills", "prefill_context_millions");
    m.attr("MAX_DEPTH") = DepthPolicy::kMostDepth;

    nb::class_<StepTimeModel>(m, "StepTimeModel")
        .def("__init__", make_times, "prior"_a.noconvert().none() = nb::none(), nb::kw_only(),
             "forgetting"_a = StepTimeOptions{}.forgetting,
             "prior_weight"_a = StepTimeOptions{}.prior_weight)
        .def("observe", observe_time, "features"_a.noconvert(), "seconds"_a)
        .def("predict", predict, "features"_a.noconvert())
        .def_prop_ro(
            "coefficients",
            [](const StepTimeModel& self) { return owned<double>(self.coefficients()); },
            nb::rv_policy::move)
        .def_prop_ro("relative_error", &StepTimeModel::relative_error)
        .def_prop_ro("median_relative_error", &StepTimeModel::median_relative_error)
        .def_prop_ro("num_observed", &StepTimeModel::num_observed);

    const AcceptanceOptions defaults;
    nb::class_<Acceptance>(m, "Acceptance")
        .def("__init__", make_acceptance, "num_drafters"_a, nb::kw_only(),
             "prior"_a = defaults.prior, "request_memory"_a = defaults.request_memory,
             "shared_memory"_a = defaults.shared_memory,
             "shared_shrinkage"_a = defaults.shared_shrinkage)
        .def("observe", observe_drafts, "request_ids"_a.noconvert(), "drafters"_a.noconvert(),
             "match_lens"_a.noconvert(), "hits"_a.noconvert(), "missed"_a.noconvert())
        .def("rate", rate, "request_id"_a, "drafter"_a, "match_len"_a, "place"_a)
        .def("forget", &Acceptance::forget, "request_id"_a)
        .def_prop_ro("num_requests", &Acceptance::num_requests);

    nb::class_<DepthPolicy>(m, "DepthPolicy")
        .def("__init__", make_policy, "times"_a, "acceptance"_a, nb::kw_only(), "num_experts"_a = 0,
             "experts_per_token"_a = 0, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("choose", choose, "base"_a.noconvert(), "request_ids"_a.noconvert(),
             "drafters"_a.noconvert(), "match_lens"_a.noconvert(), "max_depths"_a.noconvert(),
             "proposes"_a.noconvert(), "max_drafts"_a, nb::kw_only(),
             "rivals"_a.noconvert().none() = nb::none(), "floors"_a.noconvert().none() = nb::none(),
             "floor_of_others"_a = 0.0);

    bind_pacing(m);

    m.def("choose_depths", best_depths, "times"_a, "base"_a.noconvert(), "rates"_a.noconvert(),
          "max_depths"_a.noconvert(), "proposes"_a.noconvert(), "max_drafts"_a, nb::kw_only(),
          "num_experts"_a = 0, "experts_per_token"_a = 0,
          "floors"_a.noconvert().none() = nb::none(), "floor_of_others"_a = 0.0);
    m.def("experts_touched", experts_touched, "num_tokens"_a, "num_experts"_a,
          "experts_per_token"_a);
}
