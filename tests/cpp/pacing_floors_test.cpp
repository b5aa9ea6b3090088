// SPDX-License-Identifier: MIT
// Floors in every window of one second: while a long prompt arrives, at several times the load that
// can be served, with steps that overlap and rows that carry drafts; and what becomes of a stream
// that is behind.
#include "pacing_machine.h"

namespace tokenspeed::policy {
namespace {

// Tokens that come when they are due, or earlier, by any numbers, are never too few.
void test_what_is_due_suffices() {
    std::mt19937_64 random(3);
    const auto uniform = [&] { return std::uniform_real_distribution<double>()(random); };
    for (const double floor : {1.0, 4.0, 20.0, 37.1, 300.0}) {
        for (const int32_t most : {1, 2, 5}) {
            FloorSchedule schedule(floor, most);
            std::vector<double> came;
            double now_s = 0;
            while (now_s < 30) {
                const auto count = static_cast<int32_t>(1 + random() % most);
                schedule.came(now_s, count);
                came.insert(came.end(), count, now_s);
                TS_CHECK(schedule.due_s() > now_s && !schedule.behind(schedule.due_s()));
                const bool at_the_last_moment = random() % 4 != 0;
                now_s += (schedule.due_s() - now_s) * (at_the_last_moment ? 1 : uniform());
            }
            TS_CHECK(static_cast<double>(fewest_in_a_second(came, 0, 29)) >= floor);
        }
    }
}

struct Found {
    int64_t fewest;    // of any stream in any second from the newcomer's arrival on
    double prefill_s;  // of the newcomer; infinite: it had no token in 200 s
};

// Tokens per second of a stream among eight, with nothing else going on.
double unloaded_rate(Setting setting) {
    setting.noise = setting.tps_floor = 0;
    Machine machine(setting);
    const uint64_t first = start_streams(machine)[0];
    const auto before = machine.life(first).came.size();
    machine.run_until(15);
    return static_cast<double>(machine.life(first).came.size() - before) / 10;
}

Found long_prompt_arrives(const Setting& setting, int32_t length = kLong) {
    Machine machine(setting);
    const std::vector<uint64_t> ids = start_streams(machine);
    const uint64_t newcomer = machine.submit(length, 100);
    const double came_s = machine.now_s;
    const bool over = machine.finish(newcomer, came_s + 200);
    Found found{std::numeric_limits<int64_t>::max(), kNever};
    if (over) found.prefill_s = machine.life(newcomer).came[0] - came_s;
    for (uint64_t id : ids) {
        found.fewest = std::min(found.fewest,
                                fewest_in_a_second(machine.life(id).came, came_s, machine.now_s));
    }
    return found;
}

void test_floors_hold_while_a_long_prompt_arrives() {
    const double floor = 0.6 * unloaded_rate({});
    for (const double noise : {0.0, 0.1, 0.2, 0.3}) {
        for (uint64_t seed = 1; seed <= 4; ++seed) {
            const Found found =
                long_prompt_arrives({.tps_floor = floor, .noise = noise, .seed = seed});
            std::printf("floor %.1f noise %.1f: fewest %ld, first token after %.1f s\n", floor,
                        noise, static_cast<long>(found.fewest), found.prefill_s);
            TS_CHECK(static_cast<double>(found.fewest) >= floor);
            TS_CHECK(found.prefill_s < 100'000 * kTruth[kPrefillTokens] * 5);
        }
    }
    const Found unpaced = long_prompt_arrives({});
    std::printf("no pacing: fewest %ld\n", static_cast<long>(unpaced.fewest));
    TS_CHECK(static_cast<double>(unpaced.fewest) < 0.25 * floor);
}

// Rows that speculate are in every other step, and bring one to four tokens.
void test_floors_hold_with_overlap_and_drafts() {
    for (const int32_t depth : {0, 1}) {
        for (const int32_t drafts : {0, 3}) {
            Setting setting{.overlap_depth = depth, .num_draft = drafts};
            const double floor = setting.tps_floor = 0.6 * unloaded_rate(setting);
            for (uint64_t seed = 1; seed <= 4; ++seed) {
                setting.seed = seed;
                const Found found = long_prompt_arrives(setting, 20'000);
                std::printf("overlap %d drafts %d floor %.1f: fewest %ld, first token %.1f s\n",
                            depth, drafts, floor, static_cast<long>(found.fewest), found.prefill_s);
                TS_CHECK(static_cast<double>(found.fewest) >= floor && found.prefill_s < 10);
            }
        }
    }
}

// Every other stream copies, by drafts of 32 that are nearly always right: as deep as gives most
// tokens, they would make steps too long for the streams beside them.
void test_drafts_leave_the_others_their_floors() {
    const double floor = 40;
    for (const Depths depths : {Depths::kChosen, Depths::kUnderFloors}) {
        for (uint64_t seed = 1; seed <= 4; ++seed) {
            Machine machine({.tps_floor = floor,
                             .seed = seed,
                             .num_draft = 32,
                             .accepted = 0.98,
                             .depths = depths});
            const std::vector<uint64_t> ids = start_streams(machine);
            machine.submit(5000, 100);
            const double from_s = machine.now_s;
            machine.run_until(from_s + 10);
            int64_t fewest = std::numeric_limits<int64_t>::max();
            double copied = 0;
            for (uint64_t id : ids) {
                const std::vector<double>& came = machine.life(id).came;
                fewest = std::min(fewest, fewest_in_a_second(came, from_s, machine.now_s));
                if (id % 2 == 0)
                    copied +=
                        static_cast<double>(came.end() - std::ranges::lower_bound(came, from_s)) /
                        10;
            }
            std::printf(
                "copying beside others, %s: fewest %ld, %.0f tokens per second are copied\n",
                depths == Depths::kChosen ? "most tokens" : "floors", static_cast<long>(fewest),
                copied);
            TS_CHECK((static_cast<double>(fewest) >= floor) == (depths == Depths::kUnderFloors));
            TS_CHECK(copied > 4 * 4 * floor);
        }
    }
}

// Requests come three times as fast as they can be served: who runs has its floor in each second,
// and hardly anybody is refused who was let wait before.
void test_overload(Setting setting) {
    Machine machine(setting);
    std::mt19937_64 random(7);
    int64_t num_refused = 0, num_late = 0;
    double next_s = 1;
    while (machine.now_s < 120) {
        while (next_s < machine.now_s) {
            const auto length = static_cast<int32_t>(200 + random() % 3000);
            const uint64_t id = machine.submit(length, 200);
            next_s += 0.05;
            if (!machine.pacing().hopeless(id)) continue;
            TS_CHECK(machine.pacing().retry_after_s(id) >= Pacing::kLeastRetryS);
            machine.abort(id);
            ++num_refused;
        }
        for (uint64_t id : machine.pacing().overdue()) {
            TS_CHECK(machine.life(id).came.empty());
            TS_CHECK(machine.now_s - machine.life(id).asked_s > setting.max_wait_s);
            machine.abort(id);
            ++num_late;
        }
        machine.step();
    }
    int64_t num_served = 0, num_seconds = 0, num_below = 0;
    double longest_wait_s = 0;
    for (const auto& [id, life] : machine.lives()) {
        if (life.came.empty()) continue;
        ++num_served;
        longest_wait_s = std::max(longest_wait_s, life.came[0] - life.asked_s);
        for (double begin : life.came) {
            if (begin + 1 > life.came.back()) break;
            ++num_seconds;
            num_below +=
                static_cast<double>(num_within_a_second(life.came, begin)) < setting.tps_floor;
        }
    }
    std::printf(
        "overload: %ld served, %ld refused, %ld after they had waited, %ld of %ld seconds below, "
        "first token after at most %.1f s\n",
        static_cast<long>(num_served), static_cast<long>(num_refused), static_cast<long>(num_late),
        static_cast<long>(num_below), static_cast<long>(num_seconds), longest_wait_s);
    TS_CHECK(num_served > 100 && num_refused > 500);
    TS_CHECK(100 * num_late < num_refused);
    TS_CHECK(num_below == 0);
}

// Whether a stream has had less than its floor in the last second.
bool is_behind(const Machine& machine, uint64_t id, double floor) {
    const std::vector<double>& came = machine.life(id).came;
    return !came.empty() && came[0] + 1 < machine.now_s &&
           static_cast<double>(num_within_a_second(came, machine.now_s - 1)) < floor;
}

// Something holds the machine up amid a long prompt: until every stream has its floor again,
// prompts have nothing but their least share.
void test_who_is_behind_comes_first() {
    const double floor = 38;
    Machine machine({.tps_floor = floor, .noise = 0});
    const std::vector<uint64_t> ids = start_streams(machine);
    machine.submit(kLong, 10);
    machine.run_until(10);
    machine.now_s += 0.3;
    const double from_s = machine.now_s;
    const int64_t forced = machine.pacing().num_forced();
    int64_t num_prompts = 0, num_steps = 0;
    const auto any_behind = [&] {
        return std::ranges::any_of(ids, [&](auto id) { return is_behind(machine, id, floor); });
    };
    TS_CHECK(any_behind());
    do {
        TS_CHECK(machine.pacing().num_behind() > 0 || num_steps == 0);
        machine.step();
        ++num_steps;
        num_prompts += num_prefill(machine.plans.back());
    } while (any_behind());
    std::printf("held up by 0.3 s: behind for %.3f s and %ld steps, %ld tokens of prompts\n",
                machine.now_s - from_s, static_cast<long>(num_steps),
                static_cast<long>(num_prompts));
    TS_CHECK(num_prompts == (machine.pacing().num_forced() - forced) * Pacing::kLeastChunk);
    TS_CHECK(machine.now_s - from_s < 1);
    TS_CHECK(machine.pacing().num_unmeetable() == 0);
    machine.run_until(machine.now_s + 2);
    for (uint64_t id : ids) {
        const int64_t fewest = fewest_in_a_second(machine.life(id).came, from_s + 1, machine.now_s);
        TS_CHECK(static_cast<double>(fewest) >= floor);
    }
}

// All could be held when they came, and then the machine gets slow.
void test_floors_are_judged_again() {
    for (const double slowness : {1.0, 1.6, 4.0}) {
        Machine machine({.tps_floor = 40, .noise = 0});
        start_streams(machine);
        machine.slowness = slowness;
        const double from_s = machine.now_s;
        machine.run_until(from_s + 5);
        int64_t num_floors = 0;
        for (const StreamView& stream : machine.pacing().streams()) {
            num_floors += stream.tps_floor > 0;
        }
        // At 1.6 one alone would have 49 tokens per second, so floors stay; at 4 it has 20.
        TS_CHECK(num_floors == (slowness < 4 ? kStreams : 0));
        TS_CHECK(machine.pacing().num_unmeetable() == kStreams - num_floors);
        TS_CHECK(machine.pacing().num_behind() == (slowness == 1.6 ? kStreams : 0));
        // Who comes while others are behind waits; who has no floor is in nobody's way.
        const uint64_t newcomer = machine.submit(2000, 5);
        machine.run_until(machine.now_s + 3);
        TS_CHECK(machine.life(newcomer).came.empty() == (slowness == 1.6));
        TS_CHECK(machine.pacing().num_unmeetable() == kStreams - num_floors + (slowness == 4));
    }
}

// Time goes by between steps of which the model learns nothing: what was seen counts.
void test_a_stream_alone_shows_what_it_can_have() {
    Machine machine({.tps_floor = 40, .noise = 0});
    const uint64_t alone = machine.submit(500, 10'000);
    machine.run_until(5);
    TS_CHECK(machine.pacing().num_behind() == 0);
    machine.idle_s = 0.02;
    machine.run_until(6.2);
    TS_CHECK(is_behind(machine, alone, 40) && machine.pacing().num_behind() == 1);
    const uint64_t newcomer = machine.submit(500, 5);
    machine.run_until(6.5);
    TS_CHECK(machine.life(newcomer).came.empty() && machine.pacing().num_unmeetable() == 0);
    machine.run_until(8.5);
    TS_CHECK(machine.life(newcomer).over && machine.pacing().last_unmeetable() == 40);
    TS_CHECK(machine.pacing().num_unmeetable() == 1);
}

// The clock leaps on by an hour or goes back by one: nobody has waited for longer, nobody is
// behind, and what follows is as if nothing had been.
void test_a_clock_that_jumps() {
    for (const double leap_s : {3600.0, -3600.0}) {
        Machine machine({.tps_floor = 38, .noise = 0, .max_num_seqs = 8, .max_wait_s = 5});
        const std::vector<uint64_t> ids = start_streams(machine);
        const uint64_t waiting = machine.submit(500, 10);
        const double from_s = machine.now_s;
        machine.run_until(from_s + 1);
        machine.leap(leap_s);
        machine.run_until(from_s + 4.9);
        TS_CHECK(machine.pacing().overdue().empty() && machine.pacing().num_behind() == 0);
        TS_CHECK(machine.pacing().predicted_wait_s(waiting) == Pacing::kUnknownWaitS);
        machine.run_until(from_s + 5.1);
        TS_CHECK(machine.pacing().overdue() == std::vector{waiting});
        machine.abort(waiting);
        const uint64_t later = machine.submit(500, 10);
        TS_CHECK(!machine.pacing().hopeless(later));
        machine.abort(ids[0]);
        const double later_s = machine.pacing().predicted_wait_s(machine.submit(500, 10));
        TS_CHECK(later_s > 0 && later_s < 60);
        TS_CHECK(machine.finish(later, machine.now_s + 1));
        for (uint64_t id : ids) {
            if (machine.life(id).over) continue;
            const int64_t fewest = fewest_in_a_second(machine.life(id).came, from_s, machine.now_s);
            TS_CHECK(static_cast<double>(fewest) >= 38);
        }
    }
}

}  // namespace
}  // namespace tokenspeed::policy

int main() {
    using namespace tokenspeed::policy;
    test_what_is_due_suffices();
    test_who_is_behind_comes_first();
    test_floors_are_judged_again();
    test_a_stream_alone_shows_what_it_can_have();
    test_a_clock_that_jumps();
    test_drafts_leave_the_others_their_floors();
    test_floors_hold_with_overlap_and_drafts();
    test_overload({.tps_floor = 20, .noise = 0.1, .max_wait_s = 3});
    test_overload({.tps_floor = 20, .max_wait_s = 3, .overlap_depth = 1, .num_draft = 3});
    test_floors_hold_while_a_long_prompt_arrives();
    std::puts("ok");
}
