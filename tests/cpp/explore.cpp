// SPDX-License-Identifier: MIT
// Walks every interleaving of submit, abort, next_plan and commit (each row ok, stopped or failed)
// on the real scheduler, breadth first, and checks each state. The scheduler cannot be copied (its
// types see to that), so a state is reached again by replaying the shortest way to it; that the
// replay arrives at the same state is the check of determinism. Knows moves and hashes only.
//
//   explore quick|full [scenario]
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "explore_scenarios.h"
#include "explore_world.h"

namespace tokenspeed {
namespace {

class Explorer {
  public:
    Explorer(const Scenario& scenario, Coverage& coverage)
        : scenario_(scenario), coverage_(coverage) {}

    // Returns whether everything held.
    bool run() {
        const auto begin = std::chrono::steady_clock::now();
        World root(scenario_, trie_, coverage_);
        nodes_.push_back({.hash = root.hash()});
        seen_.emplace(nodes_[0].hash, 0);
        for (size_t at = 0; at < nodes_.size(); ++at) {
            if (!expand(static_cast<uint32_t>(at))) return false;
        }
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        const int stuck = count_stuck();
        std::printf(
            "%-44s %8zu states %9zu edges, %6zu merges checked, depth %2d, drain %2d, %d stuck, "
            "%.1f s\n",
            scenario_.name.c_str(), nodes_.size(), num_edges_, num_merges_, nodes_.back().depth,
            longest_drain_, stuck, took.count());
        return stuck == 0;
    }

    void print_way() const {
        std::printf("the way to it:\n");
        World world(scenario_, trie_, coverage_);
        for (const Move move : way_) {
            std::printf("  %s\n", world.describe(move).c_str());
            std::fflush(stdout);  // the last move may not return
            try {
                world.apply(move, false);
            } catch (const Violation&) {
                return;
            }
        }
    }

  private:
    struct Node {
        uint64_t hash = 0;
        uint32_t parent = 0;
        Move move = {Move::kSubmit, 0};
        int depth = 0;
        uint32_t fair = 0;  // where the engine's loop goes from here when every row is ok
        bool quiet = false;
    };

    void find_way(uint32_t node) {
        way_.resize(nodes_[node].depth);
        for (int i = nodes_[node].depth - 1; i >= 0; --i, node = nodes_[node].parent) {
            way_[i] = nodes_[node].move;
        }
    }

    std::unique_ptr<World> reach(uint32_t node) const {
        auto world = std::make_unique<World>(scenario_, trie_, coverage_);
        for (int i = 0; i < nodes_[node].depth; ++i) world->apply(way_[i], false);
        return world;
    }

    bool expand(uint32_t at) {
        find_way(at);
        const auto first = reach(at);
        nodes_[at].quiet = first->quiet();
        nodes_[at].fair = at;
        bool planned = false;
        for (const Move move : first->moves()) {
            way_.push_back(move);
            try {
                const uint32_t next = follow(at, move, planned);
                // The loop commits only when there is nothing more to plan.
                const bool plans = move.kind == Move::kPlan && (planned || next != at);
                const bool commits = move.kind == Move::kCommit && move.detail == 0;
                if (plans || (commits && nodes_[at].fair == at)) nodes_[at].fair = next;
            } catch (const Violation& violation) {
                std::printf("%s: VIOLATION after %zu states: %s\n", scenario_.name.c_str(),
                            nodes_.size(), violation.what());
                print_way();
                return false;
            }
            way_.pop_back();
        }
        return true;
    }

    uint32_t follow(uint32_t at, Move move, bool& planned) {
        const auto world = reach(at);
        demand(world->hash() == nodes_[at].hash, "I11: the same events led to another state");
        world->apply(move, true);
        if (move.kind == Move::kPlan) planned = world->planned();
        world->check_state();
        ++num_edges_;
        const uint64_t hash = world->hash();
        const auto [found, fresh] = seen_.emplace(hash, static_cast<uint32_t>(nodes_.size()));
        if (!fresh && num_edges_ % kMergeSample == 0) check_merge(found->second);
        if (fresh) {
            world->check_rejections();
            nodes_.push_back(
                {.hash = hash, .parent = at, .move = move, .depth = nodes_[at].depth + 1});
        }
        return found->second;
    }

    // Two ways led to states that look the same: they must go on in the same way. `way_` leads to
    // one of them.
    void check_merge(uint32_t other) {
        const std::vector<Move> way = way_;
        const auto continuations = [&](const std::vector<Move>& to) {
            std::vector<uint64_t> hashes;
            for (size_t next = 0;; ++next) {
                World world(scenario_, trie_, coverage_);
                for (const Move move : to) world.apply(move, false);
                const std::vector<Move> moves = world.moves();
                if (next == moves.size()) return hashes;
                world.apply(moves[next], false);
                hashes.push_back(world.hash());
            }
        };
        find_way(other);
        const bool same = continuations(way) == continuations(way_);
        way_ = way;
        demand(same, "states were merged that go on differently: the canonical hash is too coarse");
        ++num_merges_;
    }

    // I9: from each state, without a fault or an abort, the engine's loop ends every live request.
    int count_stuck() {
        constexpr int kUnknown = -1, kStuck = -2;
        std::vector<int> distance(nodes_.size(), kUnknown);
        std::vector<uint32_t> walk;
        int stuck = 0;
        for (uint32_t start = 0; start < nodes_.size(); ++start) {
            uint32_t at = start;
            for (walk.clear(); distance[at] == kUnknown && !nodes_[at].quiet;
                 at = nodes_[at].fair) {
                distance[at] = kStuck;
                walk.push_back(at);
            }
            int steps = nodes_[at].quiet ? 0 : distance[at];
            if (nodes_[at].quiet) distance[at] = 0;
            if (steps == kStuck && ++stuck == 1) {
                find_way(start);
                std::printf("%s: VIOLATION: I9: a state is stuck\n", scenario_.name.c_str());
                print_way();
            }
            for (auto node = walk.rbegin(); node != walk.rend() && steps >= 0; ++node) {
                distance[*node] = ++steps;
            }
            longest_drain_ = std::max(longest_drain_, steps);
        }
        return stuck;
    }

    const Scenario& scenario_;
    Coverage& coverage_;
    mutable Trie trie_;
    std::vector<Node> nodes_;
    std::unordered_map<uint64_t, uint32_t> seen_;
    std::vector<Move> way_;
    static constexpr size_t kMergeSample = 64;
    size_t num_edges_ = 0;
    size_t num_merges_ = 0;
    int longest_drain_ = 0;
};

Explorer* running = nullptr;

// Whether every rare thing happened.
bool report(const Coverage& c) {
    const std::pair<const char*, size_t> counts[] = {
        {"hits", c.hits},
        {"hits on decoded pages", c.decoded_hits},
        {"partial chunks", c.chunks},
        {"retractions", c.retractions},
        {"rows under a firm promise", c.firm},
        {"waits for a twin", c.held_back},
        {"evictions", c.evictions},
        {"rows of requests that are over", c.late_rows},
        {"ids reused in flight", c.id_reuse},
        {"failed rows", c.failed_rows},
        {"micro-steps in flight together", c.micro_steps},
        {"chunks behind chunks in flight", c.chunks_in_flight},
        {"answers of match_prefix", c.foretold},
        {"later arrivals of other users first", c.overtaken},
        {"pages under retention", c.retained},
        {"evictions of such pages", c.marks_evicted},
        {"rows that verify drafts", c.drafts},
        {"drafts cut short", c.cut},
        {"drafts accepted", c.accepted},
        {"drafts rejected", c.rejected},
        {"ends inside of drafts", c.stop_inside},
        {"rows that propose", c.proposing},
        {"pages of rejected drafts that were needed", c.reclaimed},
        {"drafts of requests that are over", c.late_drafts}};
    bool all = true;
    std::printf("edges with");
    for (const auto& [name, count] : counts) {
        std::printf(" %s %zu;", name, count);
        all = all && count > 0;
    }
    std::printf("\n");
    if (!all) std::printf("VIOLATION: something above never happened\n");
    return all;
}

// A TS_CHECK broke: say how it came to that, once.
void on_abort(int) {
    std::signal(SIGABRT, [](int) { std::_Exit(1); });
    std::printf("VIOLATION: the scheduler stopped itself\n");
    if (running != nullptr) running->print_way();
    std::fflush(stdout);
    std::_Exit(1);
}

int run(int argc, char** argv) {
    if (argc < 2 || (std::strcmp(argv[1], "quick") != 0 && std::strcmp(argv[1], "full") != 0)) {
        std::fprintf(stderr, "usage: explore quick|full [scenario]\n");
        return 2;
    }
    std::signal(SIGABRT, on_abort);
    const auto all = std::strcmp(argv[1], "quick") == 0 ? quick_scenarios() : full_scenarios();
    Coverage coverage;
    int explored = 0;
    for (const Scenario& scenario : all) {
        if (argc > 2 && scenario.name.find(argv[2]) == std::string::npos) continue;
        Explorer explorer(scenario, coverage);
        running = &explorer;
        if (!explorer.run()) return 1;
        running = nullptr;
        std::fflush(stdout);
        ++explored;
    }
    if (argc > 2) return explored > 0 ? 0 : 2;
    return report(coverage) ? 0 : 1;
}

}  // namespace
}  // namespace tokenspeed

int main(int argc, char** argv) { return tokenspeed::run(argc, argv); }
