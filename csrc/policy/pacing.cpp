// SPDX-License-Identifier: MIT
#include "policy/pacing.h"

#include <algorithm>
#include <cmath>

namespace tokenspeed::policy {
namespace {

constexpr double kMemory = 64;       // rows, or steps, that moving means remember
constexpr double kLifeMemory = 16;   // streams
constexpr double kLongestPause = 1;  // seconds between two calls that count for ageing
constexpr double kLeastTokenS = 1e-7, kMostTokenS = 1;

void move(double* mean, double value, double memory = kMemory) {
    *mean += (value - *mean) / memory;
}

}  // namespace

Pacing::Pacing(const StepTimeModel* times, const PacingOptions& options)
    : times_(times), options_(options) {}

void Pacing::advance(TimeUs now) {
    const TimeUs passed = now - std::exchange(told_us_, now);
    const double passed_s = static_cast<double>(passed) * 1e-6;
    if (passed_s <= 0 || passed_s > kLeapS) return;
    const double token_s =
        std::clamp(times_->coefficients()[kPrefillTokens], kLeastTokenS, kMostTokenS);
    aged_ += kAgeing * std::min(passed_s, kLongestPause) / token_s;
    now_us_ += passed;
    now_s_ = static_cast<double>(now_us_) * 1e-6;
}

// ---- Who runs -----------------------------------------------------------------------------------

uint64_t Pacing::queued(uint64_t id, const Terms& terms, int32_t num_tokens, int32_t num_uncached) {
    Stream stream{};
    stream.id = id;
    stream.floor = FloorSchedule(terms.tps_floor.value_or(options_.tps_floor), 1);
    stream.max_wait_s = terms.max_wait_us.has_value()
                            ? static_cast<double>(*terms.max_wait_us) * 1e-6
                            : options_.max_wait_s;
    stream.deadline_s = now_s_ + stream.max_wait_s;
    stream.priority = terms.priority;
    stream.context = num_tokens;
    stream.num_uncached = num_uncached;
    stream.key = static_cast<uint64_t>(aged_) + static_cast<uint64_t>(num_uncached);
    if (stream.deadline_s < kForever) deadlines_.emplace(stream.deadline_s, id);
    join_queue(stream);
    const uint64_t key = stream.key;
    streams_.insert_or_assign(id, std::move(stream));
    return key;
}

bool Pacing::admits(uint64_t id) {
    if (running_.empty()) return true;
    if (num_behind() > 0) return false;
    const Stream& stream = streams_.at(id);
    const double own = meetable(stream) ? times_per_s(stream) : 0;
    return holds(std::ssize(running_) + 1, running_context_ + stream.context,
                 std::max(own, most_times_per_s()));
}

void Pacing::admitted(uint64_t id, int32_t num_uncached) {
    Stream& stream = streams_.at(id);
    if (!meetable(stream)) give_up(stream);
    leave_queue(stream);
    stream.floor = FloorSchedule(stream.floor.floor(), tokens_per_row_);
    stream.runs = true;
    stream.num_uncached = num_uncached;
    prefilling_.emplace(turn(stream), num_uncached);
    stream.admitted_s = now_s_;
    running_.push_back(&stream);
    running_context_ += stream.context;
}

void Pacing::join_queue(Stream& stream) {
    waiting_.emplace(turn(stream), stream.num_uncached);
    waiting_context_ += stream.context;
}

// A stream that waits again later has no deadline any more: it has begun.
void Pacing::leave_queue(Stream& stream) {
    waiting_.erase(turn(stream));
    waiting_context_ -= stream.context;
    deadlines_.erase({stream.deadline_s, stream.id});
    stream.deadline_s = kForever;
}

// REQUIRES: the stream runs.
void Pacing::stop(Stream& stream) {
    prefilling_.erase(turn(stream));
    std::erase(running_, &stream);
    running_context_ -= stream.context;
    stream.behind_since_s = kForever;
    stream.last_row = stream.row_before = -1;
    stream.runs = stream.decodes = false;
}

void Pacing::retracted(uint64_t id) {
    Stream& stream = streams_.at(id);
    stop(stream);
    stream.num_uncached = static_cast<int32_t>(stream.context);
    join_queue(stream);
}

void Pacing::left(uint64_t id) {
    const auto found = streams_.find(id);
    if (found == streams_.end()) return;
    Stream& stream = found->second;
    if (stream.runs) {
        const double life_s = now_s_ - stream.admitted_s;
        if (mean_life_s_ == 0) mean_life_s_ = life_s;
        move(&mean_life_s_, life_s, kLifeMemory);
        stop(stream);
    } else {
        leave_queue(stream);
    }
    streams_.erase(found);
}

void Pacing::emitted(uint64_t id, int32_t num_tokens) {
    const auto found = streams_.find(id);
    if (found == streams_.end()) return;
    Stream& stream = found->second;
    const int64_t num_committed = num_planned_ - std::ssize(flights_);
    stream.context += num_tokens;
    running_context_ += num_tokens;
    stream.num_emitted += num_tokens;
    prefilling_.erase(turn(stream));
    if (std::exchange(stream.decodes, true)) {
        move(&tokens_per_row_, num_tokens);
        move(&steps_per_row_, static_cast<double>(num_committed - stream.last_commit));
    }
    stream.last_commit = num_committed;
    num_late_ += stream.floor.due_s() < now_s_;
    stream.floor.came(now_s_, num_tokens);
}

// Has its time of no other request. The room that it needs to come back grows with its tokens, and
// comes as fast for whoever is chosen: so does the wait.
Loss Pacing::loss(uint64_t id, int32_t num_tokens, int32_t num_uncached) const {
    const Stream& stream = streams_.at(id);
    const Work nothing;
    const double again_s =
        seconds(nothing.with(num_tokens - num_uncached, num_uncached)) - seconds(nothing);
    return {stream.floor.floor() > 0, -stream.priority, num_tokens * again_s};
}

// ---- What a step costs --------------------------------------------------------------------------

Pacing::Work Pacing::Work::with(int32_t start, int32_t num_tokens) const {
    Work more = *this;
    more.context += start + num_tokens;
    more.prefills += 1;
    more.prefill += num_tokens;
    more.pairs += policy::pairs(start, num_tokens);
    return more;
}

Features Pacing::features(const Work& work) const {
    Features x{};
    x[kStep] = 1;
    x[kDecodeRows] = work.rows;
    x[kVerifyTokens] = work.drafts;
    x[kPrefillTokens] = work.prefill;
    x[kContextThousands] = work.context / 1000;
    x[kExperts] = options_.experts.touched(work.rows + work.drafts + work.prefill);
    x[kProposeTokens] = work.proposed;
    x[kVerifies] = work.drafts > 0;
    x[kProposeDepth] = work.most_proposed;
    x[kPrefills] = work.prefills;
    x[kPrefillContext] = work.pairs;
    return x;
}

// A step of so many rows, drafted for as lately.
Pacing::Work Pacing::decoding(double rows, double context) const {
    Work work;
    work.rows = rows;
    work.drafts = rows * drafts_per_row_;
    work.proposed = rows * proposed_per_row_;
    work.most_proposed = most_proposed_;
    work.context = context;
    return work;
}

// From a stream's row to its next one, prompts left out: so many steps share the rows.
double Pacing::row_interval_s(int64_t rows, int64_t context) const {
    const double steps = rows > 1 ? steps_per_row_ : 1;
    return steps * seconds(decoding(static_cast<double>(rows) / steps,
                                    static_cast<double>(context) / steps));
}

bool Pacing::holds(int64_t rows, int64_t context, double times_per_s) const {
    return row_interval_s(rows, context) * times_per_s <= 1 - kLeastShare;
}

// How often per second a stream must have tokens; if it has had none, as many come as to others.
double Pacing::times_per_s(const Stream& stream) const {
    if (stream.decodes) return stream.floor.times_per_s();
    return FloorSchedule(stream.floor.floor(), tokens_per_row_).times_per_s();
}

double Pacing::most_times_per_s() const {
    double most = 0;
    for (const Stream* stream : running_) most = std::max(most, times_per_s(*stream));
    return most;
}

bool Pacing::meetable(const Stream& stream) const {
    if (stream.floor.floor() == 0 || times_->num_observed() < kKnown) return true;
    return holds(1, stream.context, times_per_s(stream));
}

double Pacing::least_rate(const Stream& stream) {
    const bool has_floor = stream.decodes && stream.floor.floor() > 0;
    return has_floor ? stream.floor.rate() / (1 - kLeastShare) : 0;
}

std::vector<double> Pacing::least_rates(std::span<const uint64_t> ids) const {
    std::vector<double> rates;
    for (const uint64_t id : ids) {
        const auto found = streams_.find(id);
        rates.push_back(found == streams_.end() ? 0 : least_rate(found->second));
    }
    std::vector<uint64_t> sorted(ids.begin(), ids.end());
    std::ranges::sort(sorted);
    double most = 0;
    for (const Stream* stream : running_) {
        if (!std::ranges::binary_search(sorted, stream->id)) {
            most = std::max(most, least_rate(*stream));
        }
    }
    rates.push_back(most);
    return rates;
}

int64_t Pacing::num_behind() const {
    return std::ranges::count_if(
        running_, [this](const Stream* stream) { return stream->floor.behind(now_s_); });
}

// Whether nothing but one stream has run for a second.
bool Pacing::was_alone() const {
    return running_.size() == 1 && now_s_ - alone_since_s_ >= FloorSchedule::kWindowS;
}

void Pacing::give_up(Stream& stream) {
    ++num_unmeetable_;
    last_unmeetable_ = stream.floor.floor();
    stream.floor = FloorSchedule();
}

void Pacing::judge() {
    for (Stream* stream : running_) {
        double& since_s = stream->behind_since_s;
        since_s = stream->floor.behind(now_s_) ? std::min(since_s, now_s_) : kForever;
        const bool lasts = now_s_ - since_s >= FloorSchedule::kWindowS;
        if (lasts && (was_alone() || !meetable(*stream))) give_up(*stream);
    }
}

// ---- A step -------------------------------------------------------------------------------------

void Pacing::decodes(uint64_t id) {
    Stream& stream = streams_.at(id);
    stream.row_before = std::exchange(stream.last_row, num_planned_);
}

bool Pacing::in_flight(const Stream& stream) const {
    const int64_t last = in_step(stream) ? stream.row_before : stream.last_row;
    return last >= 0 && last >= num_planned_ - std::ssize(flights_);
}

// Of the step behind the one being planned: those that decode and are not in this one.
double Pacing::next_step_s() const {
    double rows = 0, context = 0;
    for (const Stream* stream : running_) {
        const bool left_out = !in_step(*stream) && (stream->decodes || in_flight(*stream));
        rows += left_out;
        context += left_out ? static_cast<double>(stream->context) : 0;
    }
    if (rows == 0) return 0;
    const Prediction step = times_->predict(features(decoding(rows, context)));
    return step.seconds + kMargin * step.stddev;
}

void Pacing::load(const StepLoad& load) {
    judge();
    decodes_ = decoding(load.num_decodes, static_cast<double>(load.num_context));
    decodes_.drafts = load.num_drafts;
    decodes_.proposed = load.num_proposed;
    decodes_.most_proposed = load.most_proposed;
    work_ = decodes_;
    wanted_ = false;
    if (load.num_decodes > 0) {
        move(&drafts_per_row_, decodes_.drafts / decodes_.rows);
        move(&proposed_per_row_, decodes_.proposed / decodes_.rows);
        move(&most_proposed_, load.most_proposed);
    }
    budget_s_ = kForever;
    if (load.must_run) return;
    const double start_s = flights_.empty() ? now_s_ : std::max(now_s_, flights_.back().end_s);
    const double next_s = next_step_s();
    for (const Stream* stream : running_) {
        const FloorSchedule& floor = stream->floor;
        const double due_s = in_flight(*stream) ? floor.due_after(start_s) : floor.due_s();
        budget_s_ = std::min(budget_s_, due_s - start_s - (in_step(*stream) ? 0 : next_s));
    }
}

bool Pacing::fits(const Work& work) const {
    const Prediction step = times_->predict(features(work));
    const double before = flights_.empty() ? 0 : flights_.back().stddev;
    return step.seconds + kMargin * std::hypot(step.stddev, before) <= budget_s_;
}

int32_t Pacing::most_that_fits(int32_t start, int32_t num_wanted) const {
    const auto fit = [&](int32_t count) { return fits(work_.with(start, count)); };
    if (budget_s_ == kForever || fit(num_wanted)) return num_wanted;
    int32_t low = 0,
            high = (num_wanted + kLeastChunk - 1) / kLeastChunk;  // low fits, high does not
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        (fit(middle * kLeastChunk) ? low : high) = middle;
    }
    return low * kLeastChunk;
}

// Whether prompts have had so little that the least chunk is due.
bool Pacing::owes(int32_t start, int32_t num_wanted) const {
    const int32_t least = std::min(num_wanted, kLeastChunk);
    return owed_s_ >= seconds(decodes_.with(start, least)) - seconds(decodes_);
}

int32_t Pacing::chunk(uint64_t id, int32_t start, int32_t num_wanted) {
    wanted_ = true;
    int32_t count = most_that_fits(start, num_wanted);
    if (count == 0 && work_.prefills == 0 && owes(start, num_wanted)) {
        count = std::min(num_wanted, kLeastChunk);
        ++num_forced_;
    }
    if (count == 0) return 0;
    Stream& stream = streams_.at(id);
    const auto prompt = prefilling_.find(turn(stream));
    if (prompt != prefilling_.end()) prompt->second = std::max(prompt->second - count, 0);
    // Its first token comes with this step.
    if (prompt == prefilling_.end() || prompt->second == 0) stream.last_row = num_planned_;
    work_ = work_.with(start, count);
    return count;
}

void Pacing::planned() {
    const Prediction step = times_->predict(features(work_));
    const double prompts_s = step.seconds - seconds(decodes_);
    if (wanted_ && planned_s_ >= 0) {
        prompt_tokens_ += work_.prefill - prompt_tokens_ / kMemory;
        prompt_s_ += now_s_ - planned_s_ - prompt_s_ / kMemory;
    }
    planned_s_ = wanted_ ? now_s_ : -1;
    owed_s_ = wanted_ ? std::max(owed_s_ + kLeastShare * step.seconds - prompts_s, 0.0) : 0;
    const double start_s = flights_.empty() ? now_s_ : std::max(now_s_, flights_.back().end_s);
    flights_.push_back({start_s + step.seconds, step.stddev});
    ++num_planned_;
    if (running_.size() != 1 || work_.prefills > 0) alone_since_s_ = flights_.back().end_s;
}

void Pacing::committed() {
    if (!flights_.empty()) flights_.pop_front();
}

}  // namespace tokenspeed::policy
