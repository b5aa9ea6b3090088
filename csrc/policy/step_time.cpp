// SPDX-License-Identifier: MIT
#include "policy/step_time.h"

#include <algorithm>
#include <cmath>

namespace tokenspeed::policy {
namespace {

constexpr double kLeastSeconds = 1e-9;
constexpr double kLeastError = 0.01;   // clocks and machines are never better
constexpr double kDeviation = 1.4826;  // standard deviation / median of |error|, if it is normal
constexpr double kHuber = 1.345 * kDeviation;
constexpr int kSweeps = 50;

double dot(const Features& a, const Features& b) {
    double sum = 0;
    for (int i = 0; i < kNumFeatures; ++i) sum += a[i] * b[i];
    return sum;
}

bool usable(const Features& features, double seconds) {
    return std::isfinite(seconds) && seconds > 0 &&
           std::ranges::all_of(features, [](double x) { return std::isfinite(x) && x >= 0; });
}

}  // namespace

double Experts::touched(double num_tokens) const {
    if (count <= 0) return 0;
    return count * (1 - std::pow(1 - static_cast<double>(per_token) / count, num_tokens));
}

StepTimeModel::StepTimeModel(const StepTimeOptions& options)
    : prior_(options.prior),
      forgetting_(options.forgetting),
      prior_weight_(options.prior_weight),
      coefficients_(options.prior) {
    estimate_.fill(1);
    for (int i = 0; i < kNumFeatures; ++i) information_[i][i] = prior_weight_;
    factorize();
}

double StepTimeModel::seconds(const Features& features) const {
    return std::max(dot(coefficients_, features), 0.0);
}

Prediction StepTimeModel::predict(const Features& features) const {
    const double time = seconds(features);
    const double known = stddev_of_difference(features, time);
    return {time, std::hypot(known, kDeviation * error_ * time)};
}

double StepTimeModel::stddev_of_difference(const Features& difference, double seconds) const {
    const double time = std::max(seconds, kLeastSeconds);
    const Features z = shares(difference, time);
    return kDeviation * error_ * time * std::sqrt(std::max(dot(z, solved(z)), 0.0));
}

double StepTimeModel::median_error(int window) const {
    const int size = static_cast<int>(std::min<uint64_t>(num_observed_, window));
    if (size == 0) return 1;
    std::array<float, kWindow> sorted;
    for (int i = 0; i < size; ++i) sorted[i] = errors_[(num_observed_ - 1 - i) % kWindow];
    const auto middle = sorted.begin() + size / 2;
    std::nth_element(sorted.begin(), middle, sorted.begin() + size);
    return *middle;
}

bool StepTimeModel::observe(const Features& features, double seconds) {
    const double expected = this->seconds(features);
    if (!usable(features, seconds) || !std::isfinite(expected)) return false;
    // Relative to the prediction; where that is far too low, to what would be, so that one step
    // cannot count as thousands.
    const double unit = std::max({expected, seconds / 2, kLeastSeconds});
    const Features z = shares(features, unit);
    if (!(dot(z, z) > 0)) return false;
    const double error = std::abs(seconds - expected) / unit;
    errors_[num_observed_++ % kWindow] = static_cast<float>(error);
    error_ = std::max(median_error(kLately), kLeastError);
    const double weight = std::min(1.0, kHuber * error_ / std::max(error, kLeastError));
    const double innovation = seconds / unit - dot(z, estimate_);
    inform(z, weight);
    const Features step = solved(z);
    for (int i = 0; i < kNumFeatures; ++i) estimate_[i] += weight * innovation * step[i];
    constrain();
    return true;
}

// What each feature's prior cost is of a step of that many seconds.
Features StepTimeModel::shares(const Features& features, double seconds) const {
    Features z;
    for (int i = 0; i < kNumFeatures; ++i) z[i] = features[i] * prior_[i] / seconds;
    return z;
}

// Forgets along z, and only there, then adds what z tells.
void StepTimeModel::inform(const Features& z, double weight) {
    Features along;
    for (int i = 0; i < kNumFeatures; ++i) along[i] = dot(information_[i], z);
    const double norm = std::max(dot(along, z), 1e-300);
    const double forgotten = (1 - forgetting_) * weight / norm;
    for (int i = 0; i < kNumFeatures; ++i) {
        for (int j = 0; j < kNumFeatures; ++j) {
            information_[i][j] += weight * z[i] * z[j] - forgotten * along[i] * along[j];
        }
    }
    factorize();
}

// Cholesky. Where rounding has cost S2, the prior's weight is added again until it holds.
void StepTimeModel::factorize() {
    const double least = 1e-9 * prior_weight_;
    for (int j = 0; j < kNumFeatures; ++j) {
        for (int i = j; i < kNumFeatures; ++i) {
            double sum = information_[i][j];
            for (int k = 0; k < j; ++k) sum -= factor_[i][k] * factor_[j][k];
            if (i > j) {
                factor_[i][j] = sum / factor_[j][j];
            } else if (sum > least) {
                factor_[j][j] = std::sqrt(sum);
            } else {
                const double missing = std::max(prior_weight_, 1e-12 * information_[j][j]);
                for (int k = 0; k < kNumFeatures; ++k) information_[k][k] += missing;
                factorize();
                return;
            }
        }
    }
}

// information^-1 right
Features StepTimeModel::solved(Features right) const {
    for (int i = 0; i < kNumFeatures; ++i) {
        for (int k = 0; k < i; ++k) right[i] -= factor_[i][k] * right[k];
        right[i] /= factor_[i][i];
    }
    for (int i = kNumFeatures - 1; i >= 0; --i) {
        for (int k = i + 1; k < kNumFeatures; ++k) right[i] -= factor_[k][i] * right[k];
        right[i] /= factor_[i][i];
    }
    return right;
}

// The coefficients >= 0 that are nearest to the estimate, as far as the observations could tell:
// projected coordinate descent.
void StepTimeModel::constrain() {
    Features x;
    for (int i = 0; i < kNumFeatures; ++i) x[i] = std::max(estimate_[i], 0.0);
    bool moved = x != estimate_;
    for (int sweep = 0; moved && sweep < kSweeps; ++sweep) {
        moved = false;
        for (int i = 0; i < kNumFeatures; ++i) {
            double pull = 0;
            for (int k = 0; k < kNumFeatures; ++k)
                pull += information_[i][k] * (estimate_[k] - x[k]);
            const double next = std::max(x[i] + pull / information_[i][i], 0.0);
            moved = moved || std::abs(next - x[i]) > 1e-6 * (1 + x[i]);
            x[i] = next;
        }
    }
    for (int i = 0; i < kNumFeatures; ++i) coefficients_[i] = x[i] * prior_[i];
}

}  // namespace tokenspeed::policy
