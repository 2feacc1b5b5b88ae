// Runs one CUDA kernel on one CPU core: a CTA, or a cluster of them, after the other, its threads as
// fibers.
//
// Every access to global and shared memory goes through a Ref, which knows its buffer: it checks
// bounds and alignment, and for shared memory also that the bytes have been written and that no
// other thread touches them between the same two barriers. Needs x86-64 and g++.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <memory>
#include <vector>

namespace emu {

constexpr int MAX_THREADS = 1024;
constexpr int MAX_WARPS = MAX_THREADS / 32;
constexpr int MAX_CLUSTER = 16;
constexpr int MAX_MBARRIERS = 32;
constexpr int STACK_BYTES = 128 * 1024;
constexpr int SHARED_BYTES = 232448;  // what a CTA can have on sm_90
constexpr int CELL = 2;               // bytes that share one entry of the shadow of shared memory
constexpr int POISON = 0xff;          // NaN in float32, in bfloat16 and in float64

struct Dim { int x = 0, y = 0, z = 0; };

struct Cta;

struct Buffer {
  const char *name;
  char *base;
  int64_t bytes;
  Cta *shared;  // whose shared memory it is in; global memory is nobody's
  bool writable;
  bool early = false;  // may be read before the kernel before this one has been waited for
};

// Up to which of its barriers each warp of the CTA is known to have come: what its lanes did before
// is ordered before what now follows.
struct Clock {
  uint32_t passed[MAX_WARPS] = {};

  void join(const Clock &other) {
    for (int i = 0; i < MAX_WARPS; ++i)
      if (passed[i] < other.passed[i]) passed[i] = other.passed[i];
  }
};

// A barrier releases everyone when `expected` have come; `line` shows whether from one statement.
struct Barrier {
  int expected = 0, arrived = 0, line = 0, first_thread = 0;
  uint64_t generation = 0;
  Clock clocks[2];  // what those know together who come to a generation, by its parity
};

struct Copy {
  Buffer *to, *from;
  char *destination;
  const char *source;
  int bytes, copied;
};

struct Thread {
  void *stack_pointer = nullptr;
  char *stack = nullptr;
  int index = 0;
  bool done = false;
  bool may_access = true;         // global memory: has waited for the kernel before this one
  const Barrier *waiting = nullptr;
  uint64_t generation = 0;
  uint32_t passed = 0;            // barriers, its warp's own among them: as many as of other lanes
  Clock seen;                     // of other warps
  unsigned exchanges = 0;         // warp exchanges passed
  std::vector<Copy> open;         // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;
};

// Who wrote and read a cell of shared memory last, and how many barriers they had passed.
struct Shadow {
  uint32_t written, read;  // `read` of several warps: which of the CTA's `readers`
  int16_t writer, reader;  // -1: none; reader -2: several, of several warps; -3 - w: of warp w
};
// Those of several warps that have read a cell, none known to be before the others.
struct Readers {
  struct { uint32_t passed; int16_t thread; } of[MAX_WARPS];  // thread -1: none; -2: several
};
// Writers that are no threads: a copy from another CTA, which has been waited for, or has not.
constexpr int COPIED = -2, COMING = -3;

struct Warp {
  Barrier barrier;
  alignas(16) char slots[2][32][64];
  int line[16] = {}, arrived[16] = {};  // at named barriers
};

// Of a copy into shared memory of a CTA of the cluster; what it takes must stay until it is there.
struct Push {
  Cta *from;
  Buffer *to;
  char *destination;
  const char *source;
  std::vector<char> bytes;
  uint64_t phase;
};

// Full when as many arrivals as `init` said have come, and all bytes that they announced: then the
// next phase begins.
struct Mbarrier {
  Barrier barrier;
  std::vector<Push> pushes;
  int64_t bytes = 0;  // announced, and not there yet: below zero what came before it was announced

  void init(int count) {
    barrier = Barrier();
    barrier.expected = count;
    bytes = 0;
  }
  void arrive();
  void arrive_and_expect_tx(int count);
  void come(int count);
  void wait(uint32_t parity);
};

struct Cta {
  Dim block;
  int left = 0;  // threads that have not returned
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  Mbarrier mbarriers[MAX_MBARRIERS];
  std::vector<Buffer> shared_buffers;
  alignas(1024) char shared[SHARED_BYTES];
  Shadow shadow[SHARED_BYTES / CELL];
  std::vector<Readers> readers;
  std::vector<uint32_t> free_readers;
};

// All state of a launch. One kernel is one library, so there is one of these per kernel.
struct State {
  Dim thread, block, grid, block_dim;
  std::vector<std::unique_ptr<Cta>> ctas;  // of the cluster that runs
  int cluster = 1;
  Cta *cta = nullptr;
  Barrier cluster_barrier;
  std::vector<Buffer> buffers;  // global: the kernel's tensors, then those known by address
  int64_t shared_bytes = 0;
  bool dependent = false;  // launched while the kernel before it may still run
  Thread *self = nullptr;
  void *scheduler = nullptr;
  int line = 0;
  uint64_t random = 0;
  sigjmp_buf out;
  char *message = nullptr;
  int message_bytes = 0;
  void (*body)(void **) = nullptr;
  void **arguments = nullptr;
};
extern State state;

// Ends the launch; the fibers are abandoned where they are.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char *format, ...);

void block_barrier(int line);

void cluster_barrier(int line);

// Warps with a loop each may meet here from either; the lanes of one come from one statement.
void named_barrier(int id, int count, int line);

void warp_barrier(int line);

// Hands `bytes` of every lane of the warp to every other; returns the 32 slots of 64 bytes.
char (*exchange(const void *mine, int bytes, int line))[64];

// An operand of a tensor core may hold what nothing wrote, where a kernel drops the rows or columns
// that it makes: the poison shows in the others.
void check(const Buffer &buffer, const char *at, int bytes, int alignment, bool write,
           bool operand = false);

template <typename T> struct Address;

// One element, or one vector of them, in global or shared memory.
template <typename T> struct Ref {
  using Value = std::remove_const_t<T>;
  Buffer *buffer;
  char *at;

  Value load(bool operand = false) const {
    check(*buffer, at, sizeof(T), sizeof(T), false, operand);
    Value value;
    memcpy(&value, at, sizeof(T));
    return value;
  }
  const Ref &store(const Value &value) const {
    check(*buffer, at, sizeof(T), sizeof(T), true);
    memcpy(at, &value, sizeof(T));
    return *this;
  }
  operator Value() const { return load(); }
  template <typename U> explicit operator U() const { return U(load()); }
  const Ref &operator=(const Value &value) const { return store(value); }
  const Ref &operator=(const Ref &other) const { return store(other.load()); }
  template <typename U> const Ref &operator=(const Ref<U> &other) const {
    return store(other.load());
  }
  Address<T> operator&() const { return {buffer, at}; }
};

template <typename T> struct Address {
  Buffer *buffer;
  char *at;

  Ref<T> operator[](int64_t index) const { return {buffer, at + index * int64_t(sizeof(T))}; }
  Address operator+(int64_t index) const { return {buffer, at + index * int64_t(sizeof(T))}; }
  Address operator-(int64_t index) const { return *this + -index; }
};

// What `*(T *)(pointer)` becomes: checked where the pointer is an Address, plain on registers.
template <typename T, typename U> Ref<T> as(Address<U> address) {
  return {address.buffer, address.at};
}
template <typename T, typename U> T &as(U *pointer) { return *(T *)pointer; }
// What `((T *)name)` becomes.
template <typename T, typename U> Address<T> cast(Address<U> address) {
  return {address.buffer, address.at};
}
template <typename T, typename U> T *cast(U *pointer) { return (T *)pointer; }
template <typename T> Address<T> cast(void *pointer) {
  for (Buffer &buffer : state.buffers)
    if (pointer >= buffer.base && pointer < buffer.base + buffer.bytes)
      return {&buffer, (char *)pointer};
  fail("%p is in no tensor that the op was given", pointer);
}

template <typename T> Address<T> global(int index) {
  Buffer &buffer = state.buffers[index];
  return {&buffer, buffer.base};
}

// A part of the CTA's shared memory, by its name in the kernel.
template <typename T> Address<T> shared(const char *name, int64_t offset, int64_t bytes) {
  Cta &cta = *state.cta;
  for (Buffer &buffer : cta.shared_buffers)
    if (!strcmp(buffer.name, name)) return {&buffer, buffer.base};
  if (offset + bytes > state.shared_bytes)
    fail("%s ends at byte %ld of %ld of shared memory", name, (long)(offset + bytes),
         (long)state.shared_bytes);
  cta.shared_buffers.push_back({name, cta.shared + offset, bytes, &cta, true});
  return {&cta.shared_buffers.back(), cta.shared + offset};
}

// They have memory of their own.
Mbarrier *mbarriers(int count);

// To the same place of CTA `rank` of the cluster: there it is undefined until its mbarrier has been
// waited for, and here what it takes must stay.
void push(Address<void> to, Address<const void> from, int rank, int bytes,
          Mbarrier &mine);

// The same of values in registers, which need not stay: `mine` must have been told of the bytes, in
// CTA `rank`, for which the copy does not arrive.
void push_registers(Address<void> to, const void *from, int rank, int bytes, Mbarrier &mine);

// cp.async: the destination is undefined until the copy has been waited for.
void start_copy(Address<void> to, Address<const void> from, int bytes, int copied);

void commit_copies();

void wait_copies(int pending);

struct Tensor {
  const char *name;
  void *base;
  int64_t bytes;
  int32_t writable;
  int32_t early;
};

int launch(void (*body)(void **), const Tensor *tensors, int num_tensors, void **arguments,
           const int32_t *grid, int block, int cluster, int64_t shared_bytes, uint64_t seed,
           int seconds, char *message, int message_bytes);

}  // namespace emu
