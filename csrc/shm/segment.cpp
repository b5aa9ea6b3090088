// SPDX-License-Identifier: MIT
#include "segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace tokenspeed::shm {
namespace {

[[noreturn]] void refuse(const std::string& name, int error) {
    throw std::invalid_argument("shared memory " + name + ": " + std::strerror(error));
}

std::byte* map(const std::string& name, int file, size_t bytes) {
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    const int error = errno;
    close(file);
    if (data == MAP_FAILED) refuse(name, error);
    return static_cast<std::byte*>(data);
}

void check_name(const std::string& name) {
    if (name.empty() || name.size() > 200 || name.find('/') != std::string::npos)
        refuse(name, EINVAL);
}

}  // namespace

Segment Segment::create(const std::string& name, size_t bytes) {
    check_name(name);
    const int file = shm_open(("/" + name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0) refuse(name, errno);
    Segment made;
    made.name_ = name;
    made.named_ = true;
    // Reserved at once: too little memory is an error here and not a SIGBUS at the first use. Other
    // processes take the file for ready when it has its size.
    if (const int error = posix_fallocate(file, 0, static_cast<off_t>(bytes)); error != 0) {
        close(file);
        made.unlink();
        refuse(name, error);
    }
    made.data_ = map(name, file, bytes);
    made.bytes_ = bytes;
    return made;
}

bool Segment::open(const std::string& name, size_t bytes) {
    check_name(name);
    const int file = shm_open(("/" + name).c_str(), O_RDWR | O_CLOEXEC, 0600);
    if (file < 0 && errno == ENOENT) return false;
    if (file < 0) refuse(name, errno);
    struct stat status;
    if (fstat(file, &status) != 0 || static_cast<size_t>(status.st_size) < bytes) {
        close(file);
        return false;
    }
    name_ = name;
    bytes_ = bytes;
    named_ = true;
    data_ = map(name, file, bytes);
    return true;
}

Segment::Segment(Segment&& other) noexcept { *this = std::move(other); }

Segment& Segment::operator=(Segment&& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(named_, other.named_);
    return *this;
}

Segment::~Segment() {
    if (data_ != nullptr) munmap(data_, bytes_);
}

void Segment::unlink() {
    if (named_) shm_unlink(("/" + name_).c_str());
    named_ = false;
}

}  // namespace tokenspeed::shm
