// SPDX-License-Identifier: MIT
// Token drafters against a model that looks at everything (drafts_model.h), on random requests of
// small alphabets, and on texts that are worst for suffix structures.
#include <cstdio>
#include <limits>
#include <random>
#include <utility>

#include "drafts/ngram_drafter.h"
#include "drafts_model.h"

namespace tokenspeed::drafts {
namespace {

constexpr Token kLast = std::numeric_limits<Token>::max();

void check_equal(const Draft& draft, const Draft& expected) {
    TS_CHECK(draft.match_len == expected.match_len);
    TS_CHECK(draft.ids == expected.ids);
}

class Random {
  public:
    explicit Random(uint64_t seed) : random_(seed) {}
    int below(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
    bool one_in(int n) { return below(n) == 0; }
    // Ids from both ends of their range.
    Token token(int alphabet) {
        const int i = below(alphabet);
        return i % 2 == 0 ? i : kLast - i;
    }
    Tokens tokens(int length, int alphabet) {
        Tokens tokens;
        while (static_cast<int>(tokens.size()) < length) {
            if (!tokens.empty() && one_in(8)) {  // again what was there
                const int from = below(static_cast<int>(tokens.size()));
                for (int i = below(20); i > 0; --i)
                    tokens.push_back(tokens[tokens.size() - 1 - from]);
            }
            tokens.push_back(token(alphabet));
        }
        tokens.resize(length);
        return tokens;
    }

  private:
    std::mt19937_64 random_;
};

// After every token of short texts, periods and single letters among them.
void every_prefix() {
    Random random(1);
    for (int round = 0; round < 300; ++round) {
        const Tokens text = random.tokens(1 + random.below(60), 1 + random.below(4));
        SuffixDrafter drafter({.min_match = 1, .seed = static_cast<uint64_t>(round)});
        drafter.add(7, {}, "");
        for (size_t size = 1; size <= text.size(); ++size) {
            drafter.extend(7, std::span(text).subspan(size - 1, 1));
            const Tokens prefix(text.begin(), text.begin() + size);
            check_equal(drafter.longest(7, 9), own_draft(prefix, 9));
        }
    }
}

struct Counts {
    int64_t continued = 0, diverged = 0, stored = 0, evicted = 0, dropped = 0;
    int64_t resumed = 0;
};

class Walk {
  public:
    Walk(uint64_t seed, Counts& counts)
        : random_(seed),
          options_{.min_match = 1 + random_.below(3),
                   .shared_store_tokens = static_cast<size_t>(random_.below(6) * 60),
                   .max_kept_tokens = static_cast<size_t>(random_.below(6) * 150),
                   .seed = seed},
          alphabet_(2 + random_.below(3)),
          drafter_(options_),
          model_(options_),
          counts_(counts) {
        for (Tokens& base : bases_) base = random_.tokens(120, alphabet_);
    }

    void run(int num_ops) {
        for (int i = 0; i < num_ops; ++i) {
            step();
            TS_CHECK(drafter_.num_kept_tokens() == model_.num_kept_tokens());
            TS_CHECK(drafter_.num_kept_tokens() <= options_.max_kept_tokens);
            TS_CHECK(drafter_.num_stored_tokens() == model_.num_stored_tokens());
            TS_CHECK(drafter_.num_stored_tokens() <= options_.shared_store_tokens);
        }
        counts_.continued += model_.num_continued;
        counts_.diverged += model_.num_diverged;
        counts_.stored += model_.num_stored;
        counts_.evicted += model_.num_evicted;
        counts_.dropped += model_.num_dropped;
    }

  private:
    void step() {
        const int kind = random_.below(10);
        if (model_.live.empty() || (kind == 0 && model_.live.size() < 4)) return add();
        auto it = model_.live.begin();
        std::advance(it, random_.below(static_cast<int>(model_.live.size())));
        const uint64_t id = it->first;
        if (kind == 1) {
            ended_.push_back({it->second.sequence, it->second.salt});
            drafter_.remove(id);
            model_.remove(id);
            TS_CHECK(!drafter_.has(id));
            if (random_.one_in(10)) {
                drafter_.forget_ended();
                model_.forget_ended();
            }
        } else if (kind < 5) {
            const Tokens ids = some(random_.one_in(8) ? 100 : 4);
            drafter_.extend(id, ids);
            model_.extend(id, ids);
        } else {
            const size_t max_tokens = random_.below(8);
            const Draft longest = model_.propose(id, max_tokens);
            check_equal(drafter_.longest(id, max_tokens), longest);
            const Draft draft = drafter_.propose(id, max_tokens);
            if (draft.match_len != 1) return check_equal(draft, longest);
            TS_CHECK(longest.match_len < Trail::kLong);
            TS_CHECK(draft.ids.size() <= max_tokens);
            counts_.resumed += longest.match_len > 1;
        }
    }

    void add() {
        Tokens prompt = some(100);
        std::string salt(random_.below(3), 'x');
        if (!ended_.empty() && !random_.one_in(4)) {  // a session's next turn
            const auto& [sequence, its_salt] =
                ended_[random_.below(static_cast<int>(ended_.size()))];
            if (!random_.one_in(4)) salt = its_salt;
            Tokens longer = sequence;
            if (random_.one_in(2)) {
                longer.resize(random_.below(static_cast<int>(sequence.size()) + 1));
            }
            longer.insert(longer.end(), prompt.begin(), prompt.begin() + prompt.size() / 4);
            if (longer.size() < 400) prompt = longer;
        }
        drafter_.add(next_id_, prompt, salt);
        model_.add(next_id_++, prompt, salt);
    }

    // A piece of what many requests say, or noise.
    Tokens some(int most) {
        const int length = random_.below(most + 1);
        if (random_.one_in(3)) return random_.tokens(length, alphabet_);
        const Tokens& base = bases_[random_.below(2)];
        const auto from = base.begin() + random_.below(static_cast<int>(base.size()) - length + 1);
        return {from, from + length};
    }

    Random random_;
    SuffixOptions options_;
    int alphabet_;
    SuffixDrafter drafter_;
    DrafterModel model_;
    Counts& counts_;
    Tokens bases_[2];
    std::vector<std::pair<Tokens, std::string>> ended_;
    uint64_t next_id_ = 1;
};

void walks() {
    Counts counts;
    for (uint64_t seed = 0; seed < 150; ++seed) Walk(seed, counts).run(150);
    std::printf("continued %lld, diverged %lld, from stores %lld, evicted %lld, dropped %lld\n",
                (long long)counts.continued, (long long)counts.diverged, (long long)counts.stored,
                (long long)counts.evicted, (long long)counts.dropped);
    // A walk that meets nothing proves nothing.
    for (const int64_t met : {counts.continued, counts.diverged, counts.stored, counts.evicted,
                              counts.dropped, counts.resumed}) {
        TS_CHECK(met > 20);
    }
}

void ngrams() {
    Random random(3);
    for (int round = 0; round < 300; ++round) {
        const Tokens text = random.tokens(1 + random.below(80), 1 + random.below(4));
        const int min_n = 1 + random.below(3), max_n = min_n + random.below(4);
        NgramDrafter drafter(min_n, max_n, round);
        drafter.add(7, {});
        for (size_t size = 1; size <= text.size(); ++size) {
            drafter.extend(7, std::span(text).subspan(size - 1, 1));
            Tokens prefix(text.begin(), text.begin() + size);
            Draft expected;
            for (int n = max_n; n >= min_n && expected.ids.empty(); --n) {
                if (static_cast<size_t>(n) > size) continue;
                const auto starts = places(prefix, size - n, prefix, n);
                if (starts.empty()) continue;
                expected = continuation(prefix, {starts.back()}, n, 6);
            }
            check_equal(drafter.propose(7, 6), expected);
        }
    }
}

void expect_bytes(const SuffixDrafter& drafter, size_t most) {
    TS_CHECK(drafter.num_bytes() <= most * drafter.num_tokens());
}

// One id, then another; Fibonacci words; their breaks create all leaves at once.
void hostile() {
    SuffixDrafter drafter({.min_match = 1, .seed = 5});
    drafter.add(1, Tokens(4096, kLast), "");
    check_equal(drafter.propose(1, 3), {.ids = {kLast, kLast, kLast}, .match_len = 4095});
    drafter.extend(1, Tokens{5});
    check_equal(drafter.propose(1, 3), {});
    drafter.extend(1, Tokens(100, kLast));
    check_equal(drafter.propose(1, 2), {.ids = {kLast, kLast}, .match_len = 100});
    expect_bytes(drafter, 60);
    drafter.remove(1);
    // The second break gives leaves to paths of as many nodes: without kMaxWalk some 10^10 steps.
    Tokens runs(200'000, kLast);
    runs.push_back(5);
    runs.insert(runs.end(), 200'000, kLast);
    runs.insert(runs.end(), {6, kLast, kLast});
    drafter.add(1, runs, "");
    check_equal(drafter.propose(1, 2), {.ids = {kLast, kLast}, .match_len = 2});
    expect_bytes(drafter, 60);
    drafter.remove(1);

    Tokens word{1}, next{1, 0};
    while (next.size() < 20'000) {
        Tokens longer = next;
        longer.insert(longer.end(), word.begin(), word.end());
        word = std::exchange(next, longer);
    }
    drafter.add(2, next, "");
    drafter.extend(2, Tokens{2});
    check_equal(drafter.propose(2, 3), {});
    drafter.extend(2, std::span(next).first(2000));
    const Draft draft = drafter.propose(2, 8);
    TS_CHECK(draft.match_len == 2000);
    TS_CHECK(draft.ids == Tokens(next.begin() + 2000, next.begin() + 2008));
    expect_bytes(drafter, 60);
}

// What was removed and is kept is nobody's: the same id may begin again, an empty request ends.
void lifetimes() {
    SuffixDrafter drafter({.min_match = 1, .shared_store_tokens = 100, .max_kept_tokens = 20});
    for (int i = 0; i < 3; ++i) {
        drafter.add(1, {}, "");
        check_equal(drafter.propose(1, 4), {});
        drafter.remove(1);
    }
    const Tokens long_prompt(30, 3);  // more than may be kept
    drafter.add(1, long_prompt, "");
    drafter.remove(1);
    TS_CHECK(drafter.num_kept_tokens() == 0);
    TS_CHECK(drafter.num_stored_tokens() == 0);
    drafter.add(1, Tokens{1, 2, 3}, "");
    drafter.extend(1, Tokens{4, 5, 6});
    drafter.remove(1);
    TS_CHECK(drafter.num_kept_tokens() == 6);
    TS_CHECK(drafter.num_stored_tokens() == 4);
    drafter.add(2, Tokens{4}, "other");
    check_equal(drafter.propose(2, 4), {});
    drafter.add(3, Tokens{4}, "");
    check_equal(drafter.propose(3, 4), {.ids = {5, 6}, .match_len = 1});
}

// An edited text goes on behind each change where the original does, although what ends a change
// also ends every line; lines that begin alike lead nobody astray.
void edits() {
    Random random(5);
    constexpr int kLine = 30, kLines = 40;
    for (int round = 0; round < 20; ++round) {
        SuffixDrafter drafter({.min_match = 2});
        Tokens original;
        for (int line = 0; line < kLines; ++line) {
            for (int i = 0; i < 9; ++i) original.push_back(100 + i);
            while (original.size() % kLine < kLine - 2)
                original.push_back(1000 + random.below(1000));
            original.insert(original.end(), {500, 7});
        }
        drafter.add(1, original, "");
        int right = 0;
        for (int line = 0; line < kLines; ++line) {
            const auto first = original.begin() + line * kLine;
            drafter.extend(1, Tokens(first, first + kLine - 2));
            drafter.extend(1, Tokens{5000 + line, 6000 + line, 500, 7});  // a remark at its end
            const Draft draft = drafter.propose(1, kLine - 2);
            const Tokens next(first + kLine, std::min(first + 2 * kLine - 2, original.end()));
            right += !next.empty() && draft.ids == next;
            if (!draft.ids.empty()) TS_CHECK(draft.match_len < Trail::kLong);
        }
        TS_CHECK(right >= kLines - 6);
        drafter.remove(1);
    }
}

// Whatever is copied, changed and cut short, places stay inside of the text.
void trails() {
    Random random(6);
    for (int round = 0; round < 200; ++round) {
        Tokens text = random.tokens(1 + random.below(60), 3);
        Trail trail;
        for (int i = 0; i < 400; ++i) {
            text.push_back(random.one_in(9) ? -1 - i : random.token(3));
            const size_t known =
                random.one_in(6) ? 1 + random.below(static_cast<int>(text.size()) - 1) : 0;
            trail.extend(text, known);
            TS_CHECK(trail.place() < text.size());
            const Trail::Place place = trail.resume(text);
            TS_CHECK((place.next == 0) == (place.match == 0));
            TS_CHECK(place.next < text.size());
            for (int back = 0; back < place.match; ++back) {
                TS_CHECK(text[place.next - 1 - back] == text[text.size() - 1 - back]);
            }
        }
    }
}

}  // namespace
}  // namespace tokenspeed::drafts

int main() {
    using namespace tokenspeed::drafts;
    every_prefix();
    ngrams();
    hostile();
    lifetimes();
    edits();
    trails();
    walks();
    return 0;
}
