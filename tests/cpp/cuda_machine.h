// SPDX-License-Identifier: MIT
// A host that runs CUDA kernels of this project: the functions of csrc/cuda/device.h over fibers,
// one for each thread of a cluster, in turn. Barriers that somebody never reaches, and reads of
// shared memory before it was written (it starts as NaN), show up. Knows no kernel and no memory
// model: writes are seen at once.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define TS_KERNEL(threads, cluster) extern "C" inline void
#define TS_PARAMS(type) const type
#define TS_DEVICE inline
#define TS_UNROLL(count)

namespace tokenspeed::cuda {

struct Float4 {
    float x, y, z, w;
};

struct Word4 {
    uint32_t x, y, z, w;
};

// Fibers that wait for each other.
struct Meeting {
    int32_t members;
    int32_t arrived = 0;
    int64_t round = 0;
};

class Machine {
  public:
    // Runs all clusters of a grid, one after the other. `body` is a kernel with its arguments.
    static void Launch(int32_t grid_x, int32_t grid_y, int32_t cluster, int32_t threads,
                       size_t shared_bytes, const std::function<void()>& body) {
        for (int32_t y = 0; y < grid_y; ++y) {
            for (int32_t x = 0; x < grid_x; x += cluster) {
                Machine machine({x, y}, grid_y, cluster, threads, shared_bytes, body);
                machine.Run();
            }
        }
    }

    static Machine& Now() { return *now_; }

    int32_t thread() const { return current_ % threads_; }
    int32_t rank() const { return current_ / threads_; }
    int32_t block_x() const { return place_.x + rank(); }
    int32_t block_y() const { return place_.y; }
    int32_t grid_y() const { return grid_y_; }
    uint8_t* shared(int32_t rank) { return shared_[static_cast<size_t>(rank)].data(); }
    void MeetBlock() { Meet(blocks_[static_cast<size_t>(rank())]); }
    void MeetCluster() { Meet(cluster_); }

    template <class T>
    T Exchange(T value, int32_t mask) {
        Meeting& warp = warps_[static_cast<size_t>(current_ / 32)];
        mail_[static_cast<size_t>(current_)] = std::bit_cast<uint32_t>(value);
        Meet(warp);
        const T theirs = std::bit_cast<T>(mail_[static_cast<size_t>(current_ ^ mask)]);
        Meet(warp);
        return theirs;
    }

  private:
    struct Place {
        int32_t x, y;
    };
    static constexpr size_t kStack = 64 << 10;

    Machine(Place place, int32_t grid_y, int32_t cluster, int32_t threads, size_t shared_bytes,
            const std::function<void()>& body)
        : place_(place), grid_y_(grid_y), threads_(threads), body_(body) {
        const auto count = static_cast<size_t>(cluster * threads);
        shared_.assign(static_cast<size_t>(cluster), std::vector<uint8_t>(shared_bytes, 0xFF));
        blocks_.assign(static_cast<size_t>(cluster), Meeting{threads});
        warps_.assign(count / 32, Meeting{32});
        cluster_.members = cluster * threads;
        mail_.resize(count);
        fibers_.resize(count);
        ended_.assign(count, false);
        stacks_ = std::make_unique<char[]>(count * kStack);
    }

    void Run() {
        now_ = this;
        for (size_t i = 0; i < fibers_.size(); ++i) {
            getcontext(&fibers_[i]);
            fibers_[i].uc_stack.ss_sp = stacks_.get() + i * kStack;
            fibers_[i].uc_stack.ss_size = kStack;
            fibers_[i].uc_link = &scheduler_;
            makecontext(&fibers_[i], &Machine::Enter, 0);
        }
        for (size_t left = fibers_.size(); left > 0;) {
            progress_ = 0;
            for (size_t i = 0; i < fibers_.size(); ++i) {
                if (ended_[i]) continue;
                current_ = static_cast<int32_t>(i);
                swapcontext(&scheduler_, &fibers_[i]);
                if (ended_[i]) --left, ++progress_;
            }
            if (progress_ == 0) {
                std::fputs("a barrier that not all threads reach\n", stderr);
                std::abort();
            }
        }
    }

    static void Enter() {
        now_->body_();
        now_->ended_[static_cast<size_t>(now_->current_)] = true;
    }

    void Meet(Meeting& meeting) {
        const int64_t round = meeting.round;
        ++progress_;
        if (++meeting.arrived == meeting.members) {
            meeting.arrived = 0;
            ++meeting.round;
        }
        const auto me = static_cast<size_t>(current_);
        while (meeting.round == round) swapcontext(&fibers_[me], &scheduler_);
    }

    static inline Machine* now_ = nullptr;
    Place place_;
    int32_t grid_y_, threads_;
    int32_t current_ = 0;
    int64_t progress_ = 0;
    const std::function<void()>& body_;
    std::vector<std::vector<uint8_t>> shared_;
    std::vector<Meeting> blocks_, warps_;
    Meeting cluster_{};
    std::vector<uint32_t> mail_;
    std::vector<ucontext_t> fibers_;
    std::vector<bool> ended_;
    std::unique_ptr<char[]> stacks_;
    ucontext_t scheduler_{};
};

inline int32_t ThreadX() { return Machine::Now().thread(); }
inline int32_t BlockX() { return Machine::Now().block_x(); }
inline int32_t BlockY() { return Machine::Now().block_y(); }
inline int32_t GridY() { return Machine::Now().grid_y(); }
inline int32_t ClusterRank() { return Machine::Now().rank(); }
inline void SyncThreads() { Machine::Now().MeetBlock(); }
inline void SyncCluster() { Machine::Now().MeetCluster(); }
inline void WaitForKernelAhead() {}
inline void ReleaseKernelBehind() {}

template <class T>
T& SharedMemory() {
    return *reinterpret_cast<T*>(Machine::Now().shared(ClusterRank()));
}

template <class T>
T ShuffleXor(T value, int32_t mask) {
    return Machine::Now().Exchange(value, mask);
}

inline void StoreInCluster(float* target, int32_t rank, float value) {
    Machine& machine = Machine::Now();
    const auto offset = reinterpret_cast<uint8_t*>(target) - machine.shared(machine.rank());
    *reinterpret_cast<float*>(machine.shared(rank) + offset) = value;
}

inline float Exp2(float x) { return std::exp2(x); }
inline float AsFloat(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t AsBits(float value) { return std::bit_cast<uint32_t>(value); }
inline Float4 LoadFloat4(const float* at) { return {at[0], at[1], at[2], at[3]}; }
inline Word4 LoadConstant4(const void* at) {
    const auto* words = static_cast<const uint32_t*>(at);
    return {words[0], words[1], words[2], words[3]};
}

}  // namespace tokenspeed::cuda
