// SPDX-License-Identifier: MIT
// Sampling and penalties. A row is one thread's work; its noise is a hash of (seed, position,
// token).
//
// Cuts by rank (top_k) and by mass (top_p) need no full sort: tokens fall into bins by their
// distance from the largest, whole bins are in or out, and only the bin of the cut is sorted.
#include "simd.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

constexpr int kBins = 2048;
constexpr float kBinsPerNat = 64.0f;

struct Token {
    float value;
    int32_t id;
};

// Falling values, then rising ids.
bool before(const Token& a, const Token& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

void sift(Token* tokens, int64_t root, int64_t count) {
    for (;;) {
        int64_t child = 2 * root + 1;
        if (child >= count) return;
        if (child + 1 < count && before(tokens[child], tokens[child + 1])) ++child;
        if (!before(tokens[root], tokens[child])) return;
        const Token swapped = tokens[root];
        tokens[root] = tokens[child];
        tokens[child] = swapped;
        root = child;
    }
}

void sort_falling(Token* tokens, int64_t count) {
    for (int64_t root = count / 2 - 1; root >= 0; --root) sift(tokens, root, count);
    for (int64_t end = count - 1; end > 0; --end) {
        const Token largest = tokens[0];
        tokens[0] = tokens[end];
        tokens[end] = largest;
        sift(tokens, 0, end);
    }
}

// The last token that stays; later ones in the order of before() are out.
struct Cut {
    Token last;

    bool keeps(float value, int32_t id) const { return !before(last, {value, id}); }
};

int bin_of(float value, float largest) {
    const float distance = (largest - value) * kBinsPerNat;
    return distance < kBins - 1 ? static_cast<int>(distance) : kBins - 1;
}

uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

VecU mix32(VecU x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// Gumbel(0, 1) noise of the tokens `first` and up.
Vec gumbel(uint64_t key, VecU tokens) {
    const VecU bits =
        mix32(mix32(tokens + static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32));
    // (bits + 0.5) / 2^32 with the bits' relative precision near 0, by way of two halves.
    const Vec high = __builtin_convertvector(bit_cast<VecI>(bits >> 16), Vec);
    const Vec low = __builtin_convertvector(bit_cast<VecI>(bits & 0xFFFF), Vec) + 0.5f;
    Vec u = (high * 65536.0f + low) * 0x1p-32f;
    const Vec most = splat(1.0f - 0x1p-24f);
    u = u > most ? most : u;
    // log1p(-u) = log(w) * -u / (w - 1) with w the rounded 1 - u (Kahan); -u where w is 1.
    const Vec w = 1.0f - u;
    const Vec rest = w - 1.0f;
    const Vec race = rest == 0.0f ? u : log(w) * u / rest;
    return -log(race);
}

class Row {
  public:
    Row(const SampleParams& p, int64_t row)
        : p_(p),
          row_(row),
          logits_(p.logits + row * p.logits_stride),
          vocab_(p.vocab),
          temperature_(p.temperature[row]) {}

    int64_t sample() {
        float largest = 0.0f;
        if (!find_largest(&largest)) return -1;
        if (!(temperature_ >= 1e-5f)) return first_of(largest);
        largest_ = largest / temperature_;
        Cut cut{{-__FLT_MAX__, INT32_MAX}};
        if (p_.min_p[row_] > 0.0f) {
            cut.last.value = largest_ + log(splat(p_.min_p[row_]))[0];
            if (!(cut.last.value <= largest_)) cut.last.value = largest_;
        }
        const int64_t top_k = p_.top_k[row_];
        if (top_k > 0 && top_k < vocab_) cut = rank_cut(cut, top_k);
        if (p_.top_p[row_] < 1.0f) cut = mass_cut(cut, p_.top_p[row_]);
        return noisy_best(cut);
    }

  private:
    float scaled(int64_t i) const { return logits_[i] / temperature_; }

    // False if the row cannot be sampled.
    bool find_largest(float* largest) const {
        Vec top = splat(-kInfinity);
        VecI odd{};
        int64_t i = 0;
        for (; i + kLanes <= vocab_; i += kLanes) {
            const Vec x = load(logits_ + i);
            odd |= x != x;
            top = max_of(top, x);
        }
        *largest = reduce_max(top);
        for (int lane = 0; lane < kLanes; ++lane) {
            if (odd[lane] != 0) return false;
        }
        for (; i < vocab_; ++i) {
            if (logits_[i] != logits_[i]) return false;
            *largest = max_of(*largest, logits_[i]);
        }
        return *largest != kInfinity && *largest != -kInfinity;
    }

    int64_t first_of(float value) const {
        int64_t i = 0;
        while (logits_[i] != value) ++i;
        return i;
    }

    // Calls body(value, id) for the tokens that a cut keeps.
    template <typename Body>
    void each_kept(const Cut& cut, const Body& body) const {
        for (int64_t i = 0; i < vocab_; i += kLanes) {
            const int64_t count = min_of<int64_t>(kLanes, vocab_ - i);
            float values[kLanes];
            store(values, load_at(logits_, i, vocab_) / temperature_);
            for (int64_t lane = 0; lane < count; ++lane) {
                const int32_t id = static_cast<int32_t>(i + lane);
                if (cut.keeps(values[lane], id)) body(values[lane], id);
            }
        }
    }

    // The tokens of one bin that a cut keeps, sorted.
    Token* sorted_bin(const Cut& cut, int bin, int64_t* count) const {
        Token* const tokens = scratch_of<Token>(0, vocab_);
        *count = 0;
        each_kept(cut, [&](float value, int32_t id) {
            if (bin_of(value, largest_) == bin) tokens[(*count)++] = {value, id};
        });
        sort_falling(tokens, *count);
        return tokens;
    }

    // Keeps the first `top_k`.
    Cut rank_cut(const Cut& cut, int64_t top_k) const {
        int32_t counts[kBins] = {};
        each_kept(cut, [&](float value, int32_t) { ++counts[bin_of(value, largest_)]; });
        int64_t total = 0;
        for (int bin = 0; bin < kBins; ++bin) {
            if (total + counts[bin] >= top_k) {
                int64_t count = 0;
                const Token* const tokens = sorted_bin(cut, bin, &count);
                return {tokens[top_k - total - 1]};
            }
            total += counts[bin];
        }
        return cut;  // fewer than top_k are left
    }

    double mass(float value) const { return static_cast<double>(exp(splat(value - largest_))[0]); }

    // Keeps the fewest whose share of the kept mass reaches `top_p`.
    Cut mass_cut(const Cut& cut, float top_p) const {
        double masses[kBins] = {};
        double total = 0.0;
        each_kept(cut,
                  [&](float value, int32_t) { masses[bin_of(value, largest_)] += mass(value); });
        for (const double bin : masses) total += bin;
        const double wanted = static_cast<double>(top_p) * total;
        double sum = 0.0;
        for (int bin = 0; bin < kBins; ++bin) {
            if (sum + masses[bin] < wanted) {
                sum += masses[bin];
                continue;
            }
            int64_t count = 0;
            const Token* const tokens = sorted_bin(cut, bin, &count);
            for (int64_t i = 0; i < count; ++i) {
                sum += mass(tokens[i].value);
                if (sum >= wanted) return {tokens[i]};
            }
        }
        return cut;
    }

    // The kept token with the largest value + noise, the lowest id at a tie.
    int64_t noisy_best(const Cut& cut) const {
        const uint64_t key = mix64(mix64(static_cast<uint64_t>(p_.seed[row_])) +
                                   static_cast<uint64_t>(p_.position[row_]));
        VecI lane_ids{};
        for (int lane = 0; lane < kLanes; ++lane) lane_ids[lane] = lane;
        Vec best = splat(-kInfinity);
        VecI best_ids{};
        for (int64_t i = 0; i < vocab_; i += kLanes) {
            const VecI ids = lane_ids + static_cast<int32_t>(i);
            const Vec value = load_at(logits_, i, vocab_) / temperature_;
            const VecI kept =
                ((value > cut.last.value) | ((value == cut.last.value) & (ids <= cut.last.id))) &
                (ids < static_cast<int32_t>(vocab_));
            const Vec noisy =
                select(kept, value + gumbel(key, bit_cast<VecU>(ids)), splat(-kInfinity));
            const VecI better = noisy > best;
            best = select(better, noisy, best);
            best_ids = better ? ids : best_ids;
        }
        int winner = 0;
        for (int lane = 1; lane < kLanes; ++lane) {
            const bool larger = best[lane] > best[winner];
            const bool earlier = best[lane] == best[winner] && best_ids[lane] < best_ids[winner];
            if (larger || earlier) winner = lane;
        }
        return best_ids[winner];
    }

    const SampleParams& p_;
    const int64_t row_;
    const float* const logits_;
    const int64_t vocab_;
    const float temperature_;
    float largest_ = 0.0f;  // of the logits over the temperature
};

void penalize_row(const PenaltyParams& p, int64_t row) {
    const float repetition = p.repetition[row];
    const float presence = p.presence[row], frequency = p.frequency[row];
    if (repetition == 1.0f && presence == 0.0f && frequency == 0.0f) return;
    float* const logits = p.logits + row * p.logits_stride;
    const bool* const seen = p.prompt_seen + p.slots[row] * p.vocab;
    const int32_t* const counts = p.output_count + p.slots[row] * p.vocab;
    for (int64_t i = 0; i < p.vocab; ++i) {
        const float x = logits[i];
        const float turned = x > 0.0f ? x / repetition : x * repetition;
        const float count = static_cast<float>(counts[i]);
        const float repeated = (seen[i] || counts[i] > 0) ? turned : x;
        logits[i] = repeated - (frequency * count + (counts[i] > 0 ? presence : 0.0f));
    }
}

}  // namespace

void sample(const SampleParams& p) {
    parallel_for(p.num_rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) p.ids[row] = Row(p, row).sample();
    });
}

void penalize(const PenaltyParams& p) {
    parallel_for(p.num_rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) penalize_row(p, row);
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
