// SPDX-License-Identifier: MIT
// A seeded random walk over the scheduler's calls, with small machines of all kinds. After each
// call the scheduler's own books must agree (`broken_invariant`), and the device and the truth of
// device.h must agree with every plan and update. Usage: scheduler_walker [--ops N] [--seed S]
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "walker.h"

namespace tokenspeed {

SchedulerOptions Walk::random_options() {
    SchedulerOptions o;
    o.page_size = 1 + below(4);
    o.num_pages = 4 + below(one_in(2) ? 6 : 20);
    o.max_num_seqs = 1 + below(5);
    o.max_num_batched_tokens = o.max_num_seqs + below(12);
    o.max_model_len = 2 + below(o.num_pages * o.page_size + 8);
    o.max_num_partial_prefills = 1 + below(3);
    o.overlap_depth = one_in(3);
    o.num_micro_steps = o.overlap_depth > 0 ? 1 : 1 + below(4);
    o.enable_prefix_caching = !one_in(5);
    o.max_retractions = below(4);
    o.record_events = 1;
    o.retention_permille = 500 * below(3);
    return o;
}

NewRequest Walk::random_request(Truth& truth, Tokens& stop_ids) {
    NewRequest request;
    request.id = next_id_;
    request.max_tokens = 1 + below(one_in(2) ? 6 : 40);
    request.min_tokens = one_in(3) ? below(request.max_tokens + 1) : 0;
    request.read_cache = !one_in(8);
    request.prompt_logprobs = one_in(8);
    request.user = below(3);
    request.retention = {.for_us = one_in(2) ? below(60) : 0, .pinned = one_in(8)};
    for (int i = below(3); i > 0; --i) stop_ids.push_back(below(13));
    truth.salt = one_in(4);
    truth.read_cache = request.read_cache;
    truth.prompt_logprobs = request.prompt_logprobs;
    const int family = below(3);  // prompts of one family share their beginnings
    const int length = 1 + below(one_in(2) ? 6 : options_.max_model_len + 1);
    const int differs = below(2 * length);
    for (int i = 0; i < length; ++i) {
        truth.sequence.push_back(i < differs ? (i * 7 + family) % 13 : below(13));
    }
    if (!by_id_.empty() && one_in(3)) {  // the next turn of another conversation
        auto other = std::next(by_id_.begin(), below(static_cast<int>(by_id_.size())));
        truth.sequence.assign(other->second->sequence.begin(),
                              other->second->sequence.begin() + other->second->known);
        truth.salt = other->second->salt;
        for (int i = below(4); i > 0; --i) truth.sequence.push_back(below(13));
    }
    truth.num_prompt = truth.known = static_cast<int32_t>(truth.sequence.size());
    return request;
}

void Walk::submit() {
    auto truth = std::make_unique<Truth>();
    Tokens stop_ids;
    NewRequest request = random_request(*truth, stop_ids);
    const Tokens prompt = truth->sequence;
    const int limit = std::min(truth->num_prompt + request.max_tokens, options_.max_model_len);
    request.prompt = prompt;
    request.stop_ids = stop_ids;

    request.salt = {&truth->salt, 1};
    const int pages = (limit - 1 + options_.page_size - 1) / options_.page_size;
    if (truth->num_prompt >= options_.max_model_len || pages > options_.num_pages) {
        return refuse(request);
    }
    if (!truths_.empty() && one_in(6)) {
        request.id = truths_.begin()->first;
        return refuse(request);
    }
    Tokens& all = truth->sequence;
    truth->length = limit;
    truth->finish = 2;
    while (std::ssize(all) < limit) {
        all.push_back(next_token(all, all.size()));
        const int outputs = static_cast<int>(all.size()) - truth->num_prompt;
        const bool stops = std::ranges::find(stop_ids, all.back()) != stop_ids.end();
        if (truth->finish == 2 && stops && outputs >= request.min_tokens) {
            truth->length = static_cast<int32_t>(all.size());
            truth->finish = 1;
        }
    }
    foretell(request);
    scheduler_.submit(request);
    asked_[next_id_] = request.retention;
    by_id_[next_id_] = truth.get();
    truths_[next_id_++] = std::move(truth);
}

// `match_prefix` changes nothing, and when nobody else runs it says what the request will find.
void Walk::foretell(const NewRequest& request) {
    const uint64_t before = scheduler_.state_hash();
    const int32_t found = scheduler_.match_prefix(request.prompt, request.salt);
    TS_CHECK(scheduler_.state_hash() == before);
    TS_CHECK(found % options_.page_size == 0 && found < std::ssize(request.prompt));
    TS_CHECK(found == 0 || options_.enable_prefix_caching);
    foretold_ = -1;
    if (!truths_.empty() || device_.num_in_flight() > 0) return;
    foretold_ = request.read_cache && !request.prompt_logprobs ? found : 0;
    foretold_id_ = request.id;
}

// I12: what is refused leaves no trace.
void Walk::refuse(const NewRequest& request) {
    const uint64_t before = scheduler_.state_hash();
    const size_t log = scheduler_.events().size();
    bool refused = false;
    try {
        scheduler_.submit(request);
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    TS_CHECK(refused && scheduler_.state_hash() == before && scheduler_.events().size() == log);
    ++count_.refused;
}

void Walk::abort() {
    const uint64_t id = next_id_ - std::min<uint64_t>(next_id_ - 1, random_() % 12);
    const auto found = truths_.find(id);
    const uint64_t before = scheduler_.state_hash();
    const bool aborted = scheduler_.abort(id);
    TS_CHECK(aborted == (found != truths_.end()));
    if (!aborted) {
        TS_CHECK(scheduler_.state_hash() == before);  // I7: late events are no-ops
        return;
    }
    ++count_.aborts;
    found->second->over = true;
    gone_.push_back(std::move(found->second));
    truths_.erase(found);
}

void Walk::plan() {
    if (device_.num_in_flight() >= scheduler_.max_in_flight()) return commit();
    while (speculates_ && one_in(2)) speculate();
    const auto words = scheduler_.next_plan();
    if (words.empty()) {
        TS_CHECK(device_.num_in_flight() > 0 || truths_.empty());  // I9: never stuck
        return;
    }
    ++count_.plans;
    count_.micro_steps += options_.num_micro_steps > 1 && device_.num_in_flight() > 0;
    plans_.emplace_back(words.begin(), words.end());
    device_.launch(words, by_id_);
    const PlanView view(words);
    if (foretold_ >= 0 && view.num_binds() > 0 && view.request(0) == foretold_id_) {
        TS_CHECK(scheduler_.find(foretold_id_)->num_cached == foretold_);
        ++count_.foretold;
        foretold_ = -1;
    }
    for (int i = 0; i < view.num_binds(); ++i) {
        const Request* request = scheduler_.find(view.request(i));
        const bool aged = request->retractions == options_.max_retractions;
        count_.firm += aged && options_.max_retractions > 0;
    }
}

void Walk::commit() {
    if (device_.num_in_flight() == 0) return;
    const bool bad_step = one_in(40);
    const Tokens words = device_.result([&](int) { return bad_step && one_in(2); });
    std::map<uint64_t, bool> failed;
    for (int i = 0; i < words[kResultHeaderNumRows]; ++i) {
        const int32_t* row = &words[kResultHeaderWords + i * kResultRowWords];
        failed[device_.row_request(i)] = row[kResultRowStatus] == kRowFailed;
    }
    const Updates& updates = scheduler_.commit(words);
    for (const auto& [id, fails] : failed) {
        const auto found = truths_.find(id);
        if (fails && found != truths_.end()) found->second->finish = 3;
    }
    take_updates(updates);
    device_.committed();
}

// One receipt for each request, with the first that is heard of it.
void Walk::take_receipts(const Updates& updates) {
    for (size_t i = 0; i < updates.receipt_ids.size(); ++i) {
        const uint64_t id = updates.receipt_ids[i];
        const auto asked = asked_.find(id);
        TS_CHECK(asked != asked_.end());
        const Truth& truth = *by_id_.at(id);
        const auto at = std::ranges::find(updates.request_ids, id) - updates.request_ids.begin();
        const int32_t cached = updates.num_cached[at];
        const int32_t most = (truth.num_prompt - 1) / options_.page_size * options_.page_size;
        const bool reads =
            options_.enable_prefix_caching && truth.read_cache && !truth.prompt_logprobs;
        const auto miss = static_cast<Miss>(updates.receipt_miss[i]);
        ++count_.misses[updates.receipt_miss[i]];
        TS_CHECK((miss == Miss::kDisabled) == !reads);
        TS_CHECK((miss == Miss::kNone) == (reads && cached >= most));
        TS_CHECK(miss != Miss::kDiverged || cached > 0);
        const int budget = options_.num_pages * options_.retention_permille / 1000;
        const bool keeps =
            options_.enable_prefix_caching && truth.num_prompt / options_.page_size <= budget;
        const TimeUs wish = asked->second.pinned ? kMaxRetentionUs : asked->second.for_us;
        TS_CHECK(updates.receipt_kept_us[i] == (keeps ? wish : 0));
        asked_.erase(asked);
    }
    for (uint64_t id : updates.request_ids) TS_CHECK(!asked_.contains(id));
}

// What somebody said so far, and its salt.
Tokens Walk::some_tokens(uint8_t& salt) {
    if (by_id_.empty()) return {};
    const auto& [id, truth] = *std::next(by_id_.begin(), below(static_cast<int>(by_id_.size())));
    salt = truth->salt;
    return {truth->sequence.begin(), truth->sequence.begin() + truth->known};
}

void Walk::retain() {
    uint8_t salt = 0;
    Tokens tokens = some_tokens(salt);
    const Stats before = scheduler_.stats();
    const Retention retention{.for_us = one_in(2) ? below(60) : 0, .pinned = one_in(4)};
    const int count = scheduler_.retain(tokens, {&salt, 1}, retention);
    tokens.push_back(0);  // a match leaves the last token out
    const int most = scheduler_.match_prefix(tokens, {&salt, 1}) / options_.page_size;
    const Stats after = scheduler_.stats();
    TS_CHECK(after.num_free_pages == before.num_free_pages);
    if (retention.for_us > 0 || retention.pinned) {
        TS_CHECK(count == most);
        count_.retained += after.num_retained_pages + after.num_pinned_pages;
    } else {
        TS_CHECK(count <= most);
    }
}

void Walk::release() {
    uint8_t salt = 0;
    Tokens tokens = some_tokens(salt);
    const Stats before = scheduler_.stats();
    const int count = scheduler_.release(tokens, {&salt, 1});
    const Stats after = scheduler_.stats();
    TS_CHECK(after.num_free_pages - before.num_free_pages == count);
    TS_CHECK(before.num_cached_pages - after.num_cached_pages == count);
    foretold_ = -1;
    count_.released += count;
}

void Walk::take_updates(const Updates& updates) {
    take_receipts(updates);
    size_t at = 0;
    for (size_t i = 0; i < updates.request_ids.size(); ++i) {
        const auto found = truths_.find(updates.request_ids[i]);
        TS_CHECK(found != truths_.end() && !found->second->over);  // I7
        Truth& truth = *found->second;
        for (int n = 0; n < updates.num_ids[i]; ++n) {
            TS_CHECK(updates.ids[at++] == truth.sequence[truth.known++]);
        }
        TS_CHECK(updates.num_cached[i] >= 0 && updates.num_cached[i] < truth.num_prompt);
        const bool ends = truth.finish == 3 || truth.known == truth.length;
        TS_CHECK(updates.finish[i] == (ends ? truth.finish : 0));
        if (!ends) continue;
        ++(truth.finish == 3   ? count_.errors
           : truth.finish == 1 ? count_.stopped
                               : count_.finished);
        truth.over = true;
        gone_.push_back(std::move(found->second));
        truths_.erase(found);
    }
    TS_CHECK(at == updates.ids.size());
}

// A damaged result is refused as a whole.
void Walk::commit_malformed() {
    if (device_.num_in_flight() == 0) return;
    Tokens words = device_.result([](int) { return false; });
    const int damage = below(4);
    const int at = below(static_cast<int>(words.size()));
    const bool spare = at == kResultHeaderWords - 1;
    const bool id = at >= kResultHeaderWords + words[kResultHeaderNumRows] * kResultRowWords;
    if (damage == 0) words.pop_back();
    if (damage == 1) words.push_back(0);
    if (damage == 2) words[at] = INT32_MIN;
    if (damage == 3) words[at] += 1 << 20;
    if ((damage == 2 && spare) || (damage == 3 && (spare || id))) return;  // still well formed
    const uint64_t before = scheduler_.state_hash();
    bool refused = false;
    try {
        scheduler_.commit(words);
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    TS_CHECK(refused && scheduler_.state_hash() == before);
    ++count_.malformed;
}

void Walk::step() {
    const int choice = below(100);
    if (choice < 25 && truths_.size() < 9) return submit();
    if (choice < 29) return abort();
    if (choice < 31) return commit_malformed();
    if (choice < 32) {
        foretold_ = -1;
        return void(scheduler_.flush_cache());
    }
    if (choice < 34) return scheduler_.advance(now_ += below(20));
    if (choice < 35) return retain();
    if (choice < 36) return release();
    if (choice < 44) return device_.run_one();
    if (choice < 68) return commit();
    plan();
}

void Walk::check() {
    ++count_.ops;
    const std::string broken = scheduler_.broken_invariant();
    if (broken.empty()) return;
    std::fprintf(stderr, "%s\n", broken.c_str());
    std::abort();
}

// I8, I9: with nothing new, every request ends in a bounded number of steps, and all comes back.
void Walk::drain() {
    for (int steps = 0; scheduler_.has_work(); ++steps) {
        TS_CHECK(steps < 5000);
        const int in_flight = device_.num_in_flight();
        plan();
        check();
        if (device_.num_in_flight() <= in_flight) commit();
        check();
    }
    while (device_.num_in_flight() > 0) commit();
    TS_CHECK(truths_.empty());
    const Stats stats = scheduler_.stats();
    TS_CHECK(stats.num_running == 0 && stats.num_waiting == 0);
    TS_CHECK(stats.num_free_pages + stats.num_cached_pages == stats.num_pages);
    TS_CHECK(options_.enable_prefix_caching || stats.num_cached_pages == 0);
    TS_CHECK(scheduler_.flush_cache() == stats.num_cached_pages);
    count_.leaked += stats.num_pages - scheduler_.stats().num_free_pages;
    TS_CHECK(count_.leaked == 0);
    by_id_.clear();
    gone_.clear();
    ++count_.drained;
}

// I11: the same events give the same plans, under another hash key.
void Walk::compare_replay() { TS_CHECK(replay(scheduler_.events()) == plans_); }

void Walk::run(int num_ops) {
    for (int i = 0; i < num_ops; ++i) {
        step();
        check();
        if (i % 500 == 499) drain();
    }
    drain();
    compare_replay();
    count_.preemptions += scheduler_.stats().num_preemptions;
    count_.hit_tokens += device_.coverage().hit_tokens;
    count_.from_device += device_.coverage().from_device;
    count_.drafts += device_.coverage().drafts;
    count_.accepted += device_.coverage().accepted;
    count_.proposing += device_.coverage().proposing;
    count_.chunks_in_flight += device_.coverage().chunks_in_flight;
    ++count_.num_machines;
}

namespace {

uint64_t current_seed = 0;

void print_seed(int) {
    std::fprintf(stderr, "failed; again with --ops 1 --seed %llu\n",
                 static_cast<unsigned long long>(current_seed));
}

}  // namespace
}  // namespace tokenspeed

int main(int argc, char** argv) {
    std::signal(SIGABRT, tokenspeed::print_seed);
    int64_t num_ops = 100'000;
    uint64_t seed = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (std::strcmp(argv[i], "--ops") == 0) num_ops = std::atoll(argv[i + 1]);
        if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(argv[i + 1], nullptr, 10);
    }
    tokenspeed::Counters counters;
    const auto start = std::chrono::steady_clock::now();
    for (; counters.ops < num_ops; ++seed) {
        tokenspeed::current_seed = seed;
        tokenspeed::Walk(seed, counters).run(2000);
    }
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    tokenspeed::print(counters, spent.count());
    tokenspeed::check_met(counters);
    return 0;
}
