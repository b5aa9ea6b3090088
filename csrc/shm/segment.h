// SPDX-License-Identifier: MIT
// Memory that processes of one machine share under a name, until all of them have it.
#pragma once

#include <cstddef>
#include <string>

namespace tokenspeed::shm {

// A mapping. The memory lives while any process maps it; the name only while processes look for it.
class Segment {
  public:
    // Makes a new piece of memory, all zero. std::invalid_argument: the name is taken or malformed,
    // or the machine has no such amount of shared memory.
    static Segment create(const std::string& name, size_t bytes);

    // The piece that another process makes, or has made, under `name`: false while there is none.
    bool open(const std::string& name, size_t bytes);

    Segment() = default;
    Segment(Segment&& other) noexcept;
    Segment& operator=(Segment&& other) noexcept;
    ~Segment();

    // Takes the name away. Others that hold the memory keep it.
    void unlink();

    std::byte* data() const { return data_; }

  private:
    std::string name_;
    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
    bool named_ = false;  // unlink() has something to do
};

}  // namespace tokenspeed::shm
