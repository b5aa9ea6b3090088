// SPDX-License-Identifier: MIT
// Python's door to the token drafters: ids checked, the interpreter's lock given away for prompts
// and for outputs that go into a store.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "drafts/ngram_drafter.h"
#include "drafts/suffix_drafter.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenspeed::drafts;

namespace {

using Prompt = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Requests = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

uint64_t secret() {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
}

void check(std::span<const Token> ids) {
    const auto negative = std::ranges::find_if(ids, [](Token id) { return id < 0; });
    if (negative != ids.end()) {
        throw std::invalid_argument("token id " + std::to_string(*negative) + " is negative");
    }
}

template <class Drafter>
void check_live(const Drafter& self, uint64_t id) {
    if (!self.has(id)) throw nb::key_error(std::to_string(id).c_str());
}

template <class Drafter>
std::span<const Token> check_new(const Drafter& self, uint64_t id, const Prompt& prompt) {
    if (self.has(id)) {
        throw std::invalid_argument("request " + std::to_string(id) + " is there already");
    }
    const std::span<const Token> ids(prompt.data(), prompt.size());
    check(ids);
    return ids;
}

// All rows of a step: the lengths of what matches now.
template <class Drafter>
std::vector<int32_t> extend(Drafter& self, const Requests& requests, const Prompt& num_ids,
                            const Prompt& ids) {
    if (requests.size() != num_ids.size())
        throw std::invalid_argument("as many counts as requests");
    const std::span<const Token> all(ids.data(), ids.size());
    check(all);
    size_t end = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
        check_live(self, requests.data()[i]);
        if (num_ids.data()[i] < 0) throw std::invalid_argument("a count is negative");
        end += num_ids.data()[i];
    }
    if (end != all.size()) throw std::invalid_argument("counts must add up to the ids");
    std::vector<int32_t> lengths(requests.size());
    size_t at = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
        const size_t count = num_ids.data()[i];
        lengths[i] = self.extend(requests.data()[i], all.subspan(at, count));
        at += count;
    }
    return lengths;
}

template <class Drafter>
nb::tuple propose(Drafter& self, uint64_t id, int64_t max_tokens) {
    check_live(self, id);
    if (max_tokens < 0) throw std::invalid_argument("max_tokens must not be negative");
    const Draft draft = self.propose(id, static_cast<size_t>(max_tokens));
    return nb::make_tuple(draft.ids, draft.match_len);
}

template <class Drafter>
void remove(Drafter& self, uint64_t id) {
    check_live(self, id);
    nb::gil_scoped_release released;
    self.remove(id);
}

void make_ngram(NgramDrafter* self, int32_t min_n, int32_t max_n) {
    if (min_n < 1 || max_n < min_n || max_n > kMaxN) {
        throw std::invalid_argument(
            "1 <= prompt_lookup_min <= prompt_lookup_max <= " + std::to_string(kMaxN) +
            " does not hold for " + std::to_string(min_n) + " and " + std::to_string(max_n));
    }
    new (self) NgramDrafter(min_n, max_n, secret());
}

void add_ngram(NgramDrafter& self, uint64_t id, const Prompt& prompt) {
    const auto ids = check_new(self, id, prompt);
    nb::gil_scoped_release released;
    self.add(id, ids);
}

size_t count(int64_t tokens, const char* name) {
    if (tokens < 0) throw std::invalid_argument(std::string(name) + " must not be negative");
    return static_cast<size_t>(tokens);
}

void make_suffix(SuffixDrafter* self, int32_t min_match, int64_t shared_store_tokens,
                 int64_t kept_tokens) {
    if (min_match < 1) throw std::invalid_argument("suffix_min_match must be 1 or more");
    SuffixOptions options;
    options.min_match = min_match;
    options.shared_store_tokens = count(shared_store_tokens, "shared_store_tokens");
    options.max_kept_tokens = count(kept_tokens, "kept_tokens");
    options.seed = secret();
    new (self) SuffixDrafter(options);
}

void add_suffix(SuffixDrafter& self, uint64_t id, const Prompt& prompt, const nb::bytes& salt) {
    const auto ids = check_new(self, id, prompt);
    const std::string own_salt(salt.c_str(), salt.size());
    nb::gil_scoped_release released;
    self.add(id, ids, own_salt);
}

template <class Drafter>
void bind_common(nb::class_<Drafter>& bound) {
    bound
        .def("extend", &extend<Drafter>, "request_ids"_a.noconvert(), "num_ids"_a.noconvert(),
             "ids"_a.noconvert())
        .def("propose", &propose<Drafter>, "request_id"_a, "max_tokens"_a)
        .def("remove", &remove<Drafter>, "request_id"_a)
        .def_prop_ro("num_tokens", &Drafter::num_tokens)
        .def_prop_ro("num_bytes", &Drafter::num_bytes);
}

}  // namespace

NB_MODULE(_drafts, m) {
    auto ngram = nb::class_<NgramDrafter>(m, "NgramDrafter")
                     .def("__init__", &make_ngram, "prompt_lookup_min"_a, "prompt_lookup_max"_a)
                     .def("add", &add_ngram, "request_id"_a, "prompt_ids"_a.noconvert());
    bind_common(ngram);
    auto suffix =
        nb::class_<SuffixDrafter>(m, "SuffixDrafter")
            .def("__init__", &make_suffix, "min_match"_a, "shared_store_tokens"_a, "kept_tokens"_a)
            .def("add", &add_suffix, "request_id"_a, "prompt_ids"_a.noconvert(), "salt"_a)
            .def("forget_ended", &SuffixDrafter::forget_ended)
            .def_prop_ro("num_kept_tokens", &SuffixDrafter::num_kept_tokens)
            .def_prop_ro("num_stored_tokens", &SuffixDrafter::num_stored_tokens);
    bind_common(suffix);
}
