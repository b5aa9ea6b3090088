// SPDX-License-Identifier: MIT
// Who is served when, where steps are paced; what is refused; the same again; anything at random.
#include <stdexcept>

#include "pacing_machine.h"

namespace tokenspeed::policy {
namespace {

// The machine gets so slow that eight cannot have their floors, though one could: the newcomer ends
// all the same.
void test_prompts_get_their_least_share() {
    Machine machine({.tps_floor = 40, .noise = 0});
    start_streams(machine);
    const uint64_t newcomer = machine.submit(4000, 10);
    machine.run_until(machine.now_s + 0.05);  // it is admitted
    machine.slowness = 1.6;
    const double from_s = machine.now_s;
    TS_CHECK(machine.finish(newcomer, from_s + 200));
    TS_CHECK(machine.pacing().num_forced() > 10);
    const double prefill_s = machine.life(newcomer).came[0] - from_s;
    const double cost_s = 4000 * kTruth[kPrefillTokens] * machine.slowness;
    TS_CHECK(prefill_s > 3 * cost_s && prefill_s < cost_s / Pacing::kLeastShare * 1.5);
}

// Short prompts pass a long one that waits with them, but not for ever.
void test_short_before_long_and_nothing_starves() {
    Machine machine({.tps_floor = 20, .noise = 0, .max_num_seqs = 9});
    start_streams(machine);
    const uint64_t running = machine.submit(600, 200);  // takes the last slot
    machine.run_until(machine.now_s + 0.5);
    const uint64_t longer = machine.submit(20'000, 5);
    machine.run_until(machine.now_s + 0.1);
    const uint64_t shorter = machine.submit(100, 5);
    TS_CHECK(machine.finish(shorter, machine.now_s + 60));
    TS_CHECK(machine.life(running).over && machine.life(longer).came.empty());
    // From now on there is always a short one that waits, and came a moment ago.
    const double from_s = machine.now_s;
    std::vector<uint64_t> last;
    while (machine.life(longer).came.empty() && machine.now_s < from_s + 120) {
        std::erase_if(last, [&](uint64_t id) { return machine.life(id).over; });
        while (last.size() < 3) last.push_back(machine.submit(100, 5));
        machine.step();
    }
    TS_CHECK(!machine.life(longer).came.empty());
    std::printf("a long prompt among short ones: %.1f s\n", machine.now_s - from_s);
}

void test_priorities_and_users() {
    Machine machine({.tps_floor = 20, .noise = 0, .max_num_seqs = 8});
    const std::vector<uint64_t> ids = start_streams(machine);
    const uint64_t flex = machine.submit(100, 20, {.tps_floor = 0, .priority = 10}, 1);
    std::vector<uint64_t> flood;
    for (int i = 0; i < 30; ++i) flood.push_back(machine.submit(100, 20, {}, 2));
    const uint64_t other = machine.submit(100, 20, {}, 3);
    const uint64_t sooner = machine.submit(3000, 20, {.priority = -10}, 4);
    machine.abort(ids[0]);
    TS_CHECK(machine.finish(sooner, machine.now_s + 60));
    for (uint64_t id : flood) TS_CHECK(machine.life(id).came.empty());
    TS_CHECK(machine.finish(other, machine.now_s + 60));
    const auto served =
        std::ranges::count_if(flood, [&](uint64_t id) { return !machine.life(id).came.empty(); });
    TS_CHECK(served <= 3);
    TS_CHECK(machine.finish(flex, machine.now_s + 600));
    for (uint64_t id : flood) TS_CHECK(machine.life(id).over);
}

bool refused(Machine& machine, const Terms& terms) {
    try {
        machine.submit(10, 10, terms);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void test_bad_floors_are_refused() {
    Machine machine({.tps_floor = 20});
    for (const double floor : {-1.0, 1e6, kNever, std::nan("")}) {
        TS_CHECK(refused(machine, {.tps_floor = floor}));
    }
    TS_CHECK(refused(machine, {.max_wait_us = -1}));
    TS_CHECK(!machine.scheduler().has_work() && machine.pacing().streams().empty());
    Machine unpaced({});
    TS_CHECK(refused(unpaced, {.tps_floor = 5}) && refused(unpaced, {.max_wait_us = 5}));
    TS_CHECK(!refused(unpaced, {.tps_floor = 0, .priority = 3}));
}

void test_a_hopeless_floor_is_none() {
    Machine machine({.tps_floor = 20, .noise = 0});
    start_streams(machine);
    const uint64_t id = machine.submit(100, 20, {.tps_floor = 9000});
    TS_CHECK(machine.finish(id, machine.now_s + 10));
    TS_CHECK(machine.pacing().num_unmeetable() == 1);
    TS_CHECK(machine.pacing().last_unmeetable() == 9000);
}

// The same events give the same plans.
void test_replay() {
    const auto plans = [] {
        Machine machine({.tps_floor = 36});
        start_streams(machine);
        machine.submit(20'000, 10);
        machine.run_until(15);
        return machine.plans;
    };
    TS_CHECK(plans() == plans());
}

// Who gives its pages back when they run out: whoever loses least, not the latest arrival.
struct Asked {
    int32_t num_prompt, num_shared;  // tokens; of the prompt, those that others begin with too
    Terms terms = {};
};

size_t first_retracted(const std::vector<Asked>& asked, const Setting& setting) {
    Machine machine(setting);
    std::vector<uint64_t> ids;
    for (const Asked& one : asked) {
        std::vector<int32_t> prompt(one.num_prompt, static_cast<int32_t>(ids.size() + 1));
        std::fill_n(prompt.begin(), one.num_shared, 77);
        ids.push_back(machine.submit(prompt, 600, one.terms));
        while (machine.life(ids.back()).came.empty()) machine.step();
    }
    while (true) {
        machine.step();
        TS_CHECK(machine.scheduler().broken_invariant().empty());
        for (size_t i = 0; i < ids.size(); ++i) {
            if (machine.scheduler().find(ids[i])->retractions > 0) return i;
        }
    }
}

void test_who_loses_least_gives_back() {
    for (const int32_t depth : {0, 1}) {
        const Setting setting{.tps_floor = 5, .num_pages = 66, .overlap_depth = depth};
        const Setting unpaced{.num_pages = 66, .overlap_depth = depth};
        const Terms none{.tps_floor = 0};
        const std::vector<Asked> free_first = {{320, 0, none}, {160, 0}, {160, 0}};
        TS_CHECK(first_retracted(free_first, setting) == 0);
        TS_CHECK(first_retracted({{160, 0}, {320, 0, none}, {160, 0}}, setting) == 1);
        TS_CHECK(first_retracted({{160, 0}, {100, 0}, {320, 0}}, setting) == 1);
        TS_CHECK(first_retracted({{160, 0}, {160, 0}, {160, 0}}, setting) == 2);
        // Most of what the longer ones have is in the cache, and stays there for the others.
        TS_CHECK(first_retracted({{160, 0}, {320, 304}, {360, 304}}, setting) == 1);
        const Terms sooner{.priority = -1};
        TS_CHECK(first_retracted({{160, 0}, {100, 0, sooner}, {320, 0}}, setting) == 0);
        const std::vector<Asked> plain = {{320, 0}, {160, 0}, {160, 0}};
        TS_CHECK(first_retracted(plain, unpaced) == 2 && first_retracted(plain, setting) != 0);
    }
}

// What floors ask of a step: of those that decode, and beside them of those that were not named.
void test_least_rates() {
    Machine machine({.tps_floor = 30, .noise = 0});
    const uint64_t slower = machine.submit(100, 1000, {.tps_floor = 9.5});
    const uint64_t any = machine.submit(100, 1000, {.tps_floor = 0});
    const uint64_t usual = machine.submit(100, 1000);
    TS_CHECK(machine.pacing().least_rates({}) == std::vector{0.0});  // nobody has a token
    machine.run_until(2);
    const uint64_t reading = machine.submit(kLong, 10, {.tps_floor = 40});
    machine.run_until(2.5);
    const uint64_t unknown = 99;
    const auto is = [&](std::vector<uint64_t> ids, std::vector<double> floors) {
        const std::vector<double> rates = machine.pacing().least_rates(ids);
        TS_CHECK(rates.size() == floors.size());
        for (size_t i = 0; i < rates.size(); ++i) {
            TS_CHECK(std::abs(rates[i] - floors[i] / 0.9 / 0.95) < 1e-9);
        }
    };
    is({}, {30});
    is({usual}, {30, 10});
    is({unknown, usual, any, reading, slower}, {0, 30, 0, 0, 10, 0});
    machine.abort(usual);
    is({usual}, {0, 10});
}

// The plan was none: aborts some of those who run all the same and have no token yet. How many.
int abort_unsent(Machine& machine, std::mt19937_64& random) {
    int count = 0;
    for (const StreamView& stream : machine.pacing().streams()) {
        if (!stream.runs || stream.num_tokens > 0 || random() % 2 == 0) continue;
        machine.abort(stream.id);
        ++count;
    }
    return count;
}

// Few pages, anything at any time: no invariant breaks, a device knows whose each row is (see
// Machine::check_tables), and all ends.
void test_at_random() {
    int num_unsent = 0;
    for (uint64_t seed = 1; seed <= 60; ++seed) {
        Machine machine({.tps_floor = seed % 5 == 0 ? 60.0 : 30.0,
                         .seed = seed,
                         .num_pages = 80,
                         .max_num_seqs = 6,
                         .overlap_depth = static_cast<int32_t>(seed % 2),
                         .num_draft = static_cast<int32_t>(seed % 4),
                         .depths = static_cast<Depths>(seed % 3)});
        std::mt19937_64 random(seed);
        std::vector<uint64_t> ids;
        for (int i = 0; i < 400; ++i) {
            if (random() % 6 == 0) {
                const std::optional<double> floors[] = {std::nullopt, 0, 10, 45, 5000};
                const Terms terms{floors[random() % 5], std::nullopt,
                                  static_cast<int32_t>(random() % 3)};
                ids.push_back(machine.submit(static_cast<int32_t>(1 + random() % 900),
                                             static_cast<int32_t>(1 + random() % 200), terms,
                                             random() % 3));
            }
            if (!ids.empty() && random() % 40 == 0) machine.abort(ids[random() % ids.size()]);
            const size_t num_plans = machine.plans.size();
            machine.step();
            if (machine.plans.size() == num_plans) num_unsent += abort_unsent(machine, random);
            const std::string broken = machine.scheduler().broken_invariant();
            if (!broken.empty()) std::puts(broken.c_str());
            TS_CHECK(broken.empty());
        }
        for (uint64_t id : ids) TS_CHECK(machine.finish(id, machine.now_s + 2000));
        TS_CHECK(machine.pacing().streams().empty());
    }
    TS_CHECK(num_unsent > 0);
}

}  // namespace
}  // namespace tokenspeed::policy

int main() {
    using namespace tokenspeed::policy;
    test_bad_floors_are_refused();
    test_a_hopeless_floor_is_none();
    test_short_before_long_and_nothing_starves();
    test_priorities_and_users();
    test_prompts_get_their_least_share();
    test_who_loses_least_gives_back();
    test_replay();
    test_least_rates();
    test_at_random();
    std::puts("ok");
}
