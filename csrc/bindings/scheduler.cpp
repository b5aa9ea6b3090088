// SPDX-License-Identifier: MIT
// Python's door to the scheduler: arrays in, arrays out. Decides nothing.
#include "scheduler/scheduler.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenspeed;

namespace {

using Words = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

std::span<const int32_t> view(const Words& words) { return {words.data(), words.size()}; }

std::span<const uint8_t> view(const nb::bytes& bytes) {
    return {static_cast<const uint8_t*>(bytes.data()), bytes.size()};
}

// A copy that NumPy owns: the scheduler reuses its buffers, a runner may still read this one.
Array<int32_t> owned(std::span<const int32_t> words) {
    auto* data = new int32_t[std::max<size_t>(words.size(), 1)];
    std::ranges::copy(words, data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
    return Array<int32_t>(data, {words.size()}, owner);
}

template <auto Column>
auto column(nb::handle self) {
    auto& values = nb::cast<Updates&>(self).*Column;
    using T = typename std::decay_t<decltype(values)>::value_type;
    return Array<T>(values.data(), {values.size()}, self);
}

HashKey hash_key(const std::optional<nb::bytes>& bytes) {
    HashKey key;
    if (bytes.has_value()) {
        if (bytes->size() != sizeof(key)) throw std::invalid_argument("hash_key must be 16 bytes");
        std::memcpy(&key, bytes->data(), sizeof(key));
        return key;
    }
    std::random_device random;
    key.k0 = uint64_t{random()} << 32 | random();
    key.k1 = uint64_t{random()} << 32 | random();
    return key;
}

void make(Scheduler* self, int num_pages, int page_size, int max_num_seqs,
          int max_num_batched_tokens, int max_model_len, int max_num_partial_prefills,
          int overlap_depth, int num_micro_steps, bool enable_prefix_caching,
          std::optional<nb::bytes> key, bool record_events, double retention_share) {
    SchedulerOptions options;
    options.num_pages = num_pages;
    options.page_size = page_size;
    options.max_num_seqs = max_num_seqs;
    options.max_num_batched_tokens = max_num_batched_tokens;
    options.max_model_len = max_model_len;
    options.max_num_partial_prefills = max_num_partial_prefills;
    options.overlap_depth = overlap_depth;
    options.num_micro_steps = num_micro_steps;
    options.enable_prefix_caching = enable_prefix_caching;
    options.record_events = record_events;
    if (!(retention_share >= 0 && retention_share <= 1)) {
        throw std::invalid_argument("retention_share must be between 0 and 1");
    }
    options.retention_permille = static_cast<int32_t>(std::lround(retention_share * 1000));
    new (self) Scheduler(options, hash_key(key));
}

// Any count that Python can name; what is beyond the context is the same as the context.
int32_t clamped(int64_t count) {
    return static_cast<int32_t>(std::clamp<int64_t>(count, INT32_MIN, INT32_MAX));
}

TimeUs microseconds(double seconds, const char* name) {
    if (!(seconds >= 0)) throw std::invalid_argument(std::string(name) + " must not be negative");
    constexpr double kMost = 1e12;  // some 30,000 years
    return std::llround(std::min(seconds, kMost) * 1e6);
}

Retention retention(double seconds, bool pinned) {
    return {microseconds(seconds, "retention_s"), pinned};
}

void submit(Scheduler& self, uint64_t request_id, const Words& prompt, int64_t max_tokens,
            int64_t min_tokens, const std::optional<Words>& stop_ids, const nb::bytes& salt,
            bool read_cache, bool prompt_logprobs, uint64_t user, double retention_s, bool pinned,
            std::optional<double> tps_floor, int32_t priority, std::optional<double> max_wait_s) {
    NewRequest request;
    request.id = request_id;
    request.prompt = view(prompt);
    request.max_tokens = clamped(max_tokens);
    request.min_tokens = clamped(min_tokens);
    if (stop_ids.has_value()) request.stop_ids = view(*stop_ids);
    request.salt = view(salt);
    request.read_cache = read_cache;
    request.prompt_logprobs = prompt_logprobs;
    request.user = user;
    request.retention = retention(retention_s, pinned);
    request.terms.tps_floor = tps_floor;
    request.terms.priority = priority;
    if (max_wait_s.has_value()) {
        request.terms.max_wait_us = microseconds(*max_wait_s, "max_wait_s");
    }
    self.submit(request);
}

void check_invariants(const Scheduler& self) {
    const std::string broken = self.broken_invariant();
    if (!broken.empty()) throw std::runtime_error(broken);
}

nb::bytes events(const Scheduler& self) {
    return nb::bytes(self.events().data(), self.events().size());
}

std::vector<Array<int32_t>> replay_events(const nb::bytes& bytes) {
    std::vector<Array<int32_t>> plans;
    for (const auto& plan : replay(view(bytes))) plans.push_back(owned(plan));
    return plans;
}

}  // namespace

NB_MODULE(_scheduler, m) {
    m.attr("FINISH_NONE") = static_cast<int>(Finish::kNone);
    m.attr("FINISH_STOP") = static_cast<int>(Finish::kStop);
    m.attr("FINISH_LENGTH") = static_cast<int>(Finish::kLength);
    m.attr("FINISH_ERROR") = static_cast<int>(Finish::kError);

    m.attr("MISS_NONE") = static_cast<int>(Miss::kNone);
    m.attr("MISS_DIVERGED") = static_cast<int>(Miss::kDiverged);
    m.attr("MISS_EVICTED") = static_cast<int>(Miss::kEvicted);
    m.attr("MISS_NEVER_CACHED") = static_cast<int>(Miss::kNeverCached);
    m.attr("MISS_DISABLED") = static_cast<int>(Miss::kDisabled);

    nb::class_<Updates>(m, "Updates")
        .def_prop_ro("request_ids", column<&Updates::request_ids>)
        .def_prop_ro("finish", column<&Updates::finish>)
        .def_prop_ro("num_ids", column<&Updates::num_ids>)
        .def_prop_ro("num_cached", column<&Updates::num_cached>)
        .def_prop_ro("ids", column<&Updates::ids>)
        .def_prop_ro("receipt_ids", column<&Updates::receipt_ids>)
        .def_prop_ro("receipt_miss", column<&Updates::receipt_miss>)
        .def_prop_ro("receipt_kept_us", column<&Updates::receipt_kept_us>);

    nb::class_<Stats>(m, "Stats")
        .def_ro("num_running", &Stats::num_running)
        .def_ro("num_waiting", &Stats::num_waiting)
        .def_ro("num_pages", &Stats::num_pages)
        .def_ro("num_free_pages", &Stats::num_free_pages)
        .def_ro("num_cached_pages", &Stats::num_cached_pages)
        .def_ro("num_preemptions", &Stats::num_preemptions)
        .def_ro("prefix_queries", &Stats::prefix_queries)
        .def_ro("prefix_hits", &Stats::prefix_hits)
        .def_ro("num_steps", &Stats::num_steps)
        .def_ro("num_retained_pages", &Stats::num_retained_pages)
        .def_ro("num_pinned_pages", &Stats::num_pinned_pages);

    nb::class_<Scheduler>(m, "Scheduler")
        .def("__init__", make, nb::kw_only(), "num_pages"_a, "page_size"_a, "max_num_seqs"_a,
             "max_num_batched_tokens"_a, "max_model_len"_a, "max_num_partial_prefills"_a = 4,
             "overlap_depth"_a = 0, "num_micro_steps"_a = 1, "enable_prefix_caching"_a = true,
             "hash_key"_a.none() = nb::none(), "record_events"_a = false, "retention_share"_a = 0.5)
        .def("submit", submit, "request_id"_a, "prompt"_a.noconvert(), nb::kw_only(),
             "max_tokens"_a, "min_tokens"_a = 0, "stop_ids"_a.noconvert().none() = nb::none(),
             "salt"_a = nb::bytes("", 0), "read_cache"_a = true, "prompt_logprobs"_a = false,
             "user"_a = 0, "retention_s"_a = 0.0, "pinned"_a = false,
             "tps_floor"_a.none() = nb::none(), "priority"_a = 0,
             "max_wait_s"_a.none() = nb::none())
        .def("pace", &Scheduler::pace, "pacing"_a, nb::keep_alive<1, 2>())
        .def("abort", &Scheduler::abort, "request_id"_a)
        .def(
            "speculate",
            [](Scheduler& self, uint64_t request_id, const Words& draft, int32_t num_propose) {
                return self.speculate(request_id, view(draft), num_propose);
            },
            "request_id"_a, "draft"_a.noconvert(), "num_propose"_a = 0)
        .def("next_plan",
             [](Scheduler& self) -> std::optional<Array<int32_t>> {
                 const auto plan = self.next_plan();
                 if (plan.empty()) return std::nullopt;
                 return owned(plan);
             })
        .def(
            "commit",
            [](Scheduler& self, const Words& result) { return Updates(self.commit(view(result))); },
            "result"_a.noconvert())
        .def(
            "match_prefix",
            [](const Scheduler& self, const Words& tokens, const nb::bytes& salt) {
                return self.match_prefix(view(tokens), view(salt));
            },
            "tokens"_a.noconvert(), "salt"_a = nb::bytes("", 0))
        .def(
            "advance",
            [](Scheduler& self, double now_s) { self.advance(microseconds(now_s, "now_s")); },
            "now_s"_a)
        .def(
            "retain",
            [](Scheduler& self, const Words& tokens, const nb::bytes& salt, double retention_s,
               bool pinned) {
                return self.retain(view(tokens), view(salt), retention(retention_s, pinned));
            },
            "tokens"_a.noconvert(), "salt"_a = nb::bytes("", 0), nb::kw_only(),
            "retention_s"_a = 0.0, "pinned"_a = false)
        .def(
            "release",
            [](Scheduler& self, const Words& tokens, const nb::bytes& salt) {
                return self.release(view(tokens), view(salt));
            },
            "tokens"_a.noconvert(), "salt"_a = nb::bytes("", 0))
        .def("has_work", &Scheduler::has_work)
        .def("stats", &Scheduler::stats)
        .def("flush_cache", &Scheduler::flush_cache)
        .def("check_invariants", check_invariants)
        .def("events", events);

    m.def("replay", replay_events, "events"_a);
}
