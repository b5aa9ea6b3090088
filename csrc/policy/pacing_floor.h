// SPDX-License-Identifier: MIT
// One stream against its floor of F tokens per second: when its next token is due, and whether it
// has had less over the last second. Knows when its tokens came; no other stream and no step.
//
// Tokens are due at a rate of r behind those that came, and a stream is at most B seconds ahead or
// behind; what it has beyond that is forgotten. Of tokens that come at once all but one are a lead.
//
//      came                 due           due = clamp(due, came - B, came + lead) + n / r
//   ----|--- up to lead -----|-- n / r --|-->     lead = max(B - (n - 1) / r, 0), had at the start
//                                       r = max(F / (1 - B - S), (F + m - 1) / (1 - S))
//
// n tokens came at once, m are as many as did lately, and F is a whole number, since tokens are.
//   W1  A stream whose tokens come at most S seconds after they are due has F of them in every
//       window of one second from its first one on: behind one at t, who has had k more has the
//       next by t + max(B + 1/r, n/r) + k/r + S, so in a second k > r (1 - S) - max(rB + 1, n)
//       >= F - 1.
//   W2  What came too late for W1 is remembered for a second: the next token is due when the last
//       second would have less than F. If that is past, the stream is behind.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>

namespace tokenspeed::policy {

class FloorSchedule {
  public:
    static constexpr double kBankS = 0.08, kLateS = 0.02;
    static constexpr double kWindowS = 1;
    static constexpr double kMemory = 64;  // times that tokens came, for `at_once`

    FloorSchedule() = default;  // no floor: nothing is ever due
    // REQUIRES: floor >= 0, 0 for none; at_once >= 1, what is believed before any token came.
    FloorSchedule(double floor, double at_once)
        : floor_(floor),
          whole_(floor < 1 ? floor : std::ceil(floor)),
          at_once_(at_once),
          most_at_once_(at_once) {}

    double floor() const { return floor_; }
    double at_once() const { return at_once_; }  // tokens, in the mean

    // Tokens per second at which they are due.
    double rate() const {
        const double beyond = floor_ < 1 ? 0 : most_at_once_ - 1;
        return std::max(whole_ / (1 - kBankS - kLateS), (whole_ + beyond) / (1 - kLateS));
    }
    // How often per second tokens must come.
    double times_per_s() const { return rate() / at_once_; }

    // REQUIRES: num_tokens >= 1; no earlier than the last ones.
    void came(double now_s, int32_t num_tokens) {
        if (floor_ == 0) return;
        if (!lately_.empty()) {
            at_once_ += (num_tokens - at_once_) / kMemory;
            most_at_once_ += (1 - most_at_once_) / kMemory;
            most_at_once_ = std::max(most_at_once_, static_cast<double>(num_tokens));
        }
        due_s_ = paced(now_s, num_tokens);
        lately_.push_back({now_s, num_tokens});
        num_lately_ += num_tokens;
        while (floor_ < 1 ? lately_.size() > 1
                          : static_cast<double>(num_lately_ - lately_.front().num) >= whole_) {
            num_lately_ -= lately_.front().num;
            lately_.pop_front();
        }
    }

    // When the next token must come. Infinite: never, or the first one has not come.
    double due_s() const {
        return lately_.empty() ? kForever : std::min(due_s_, whole_until(0, kForever));
    }
    // ... after as many as come at once in the mean have come at `at_s`.
    double due_after(double at_s) const {
        if (floor_ == 0) return kForever;
        return std::min(paced(at_s, at_once_), whole_until(at_once_, at_s));
    }
    // Whether the last second had less than the floor.
    bool behind(double now_s) const { return !lately_.empty() && whole_until(0, kForever) < now_s; }

  private:
    static constexpr double kForever = std::numeric_limits<double>::infinity();
    struct Event {
        double at_s;
        int32_t num;
    };

    double paced(double came_s, double num_tokens) const {
        const double lead_s = std::max(kBankS - (num_tokens - 1) / rate(), 0.0);
        const double due_s = lately_.empty() ? kForever : due_s_;
        return std::clamp(due_s, came_s - kBankS, came_s + lead_s) + num_tokens / rate();
    }
    // Until when the last second has F tokens, with `more` at `at_s` and none after these.
    double whole_until(double more, double at_s) const {
        if (floor_ < 1) return kForever;
        double num_behind = static_cast<double>(num_lately_) + more;
        for (const Event& event : lately_) {
            num_behind -= event.num;
            if (num_behind < whole_) return event.at_s + kWindowS;
        }
        return at_s + kWindowS;
    }

    double floor_ = 0, whole_ = 0;
    double at_once_ = 1, most_at_once_ = 1;
    double due_s_ = 0;
    std::deque<Event> lately_;  // the last F tokens, and who came with the first of them
    int64_t num_lately_ = 0;
};

}  // namespace tokenspeed::policy
