// Runs one CUDA kernel on one CPU core: a CTA after the other, its threads as fibers.
//
// Every access to global and shared memory goes through a Ref, which knows its buffer: it checks
// bounds and alignment, and for shared memory also that the bytes have been written and that no
// other thread touches them between the same two barriers. Needs x86-64 and g++.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/time.h>
#include <type_traits>
#include <vector>

namespace emu {

constexpr int MAX_THREADS = 1024;
constexpr int STACK_BYTES = 128 * 1024;
constexpr int SHARED_BYTES = 232448;  // what a CTA can have on sm_90
constexpr int CELL = 2;               // bytes that share one entry of the shadow of shared memory
constexpr int POISON = 0xff;          // NaN in float32, in bfloat16 and in float64

struct Dim { int x = 0, y = 0, z = 0; };

struct Buffer {
  const char *name;
  char *base;
  int64_t bytes;
  bool shared;
  bool writable;
};

// A barrier releases everyone when `expected` have come; `line` shows whether from one statement.
struct Barrier {
  int expected = 0, arrived = 0, line = 0, first_thread = 0;
  uint64_t generation = 0;
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
  uint32_t epoch = 0;             // barriers passed
  unsigned exchanges = 0;         // warp exchanges passed
  std::vector<Copy> open;         // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;
};

// Who wrote and read a cell of shared memory last, and between which barriers.
struct Shadow {
  uint32_t write_epoch, read_epoch;
  int16_t writer, reader;  // -1: none; reader -2: several
};

struct Warp {
  Barrier barrier;
  alignas(16) char slots[2][32][64];
};

// All state of a launch. One kernel is one library, so there is one of these per kernel.
struct State {
  Dim thread, block, grid, block_dim;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<Buffer> buffers;  // global: the kernel's tensors, then those known by address
  std::vector<Buffer> shared_buffers;
  alignas(1024) char shared[SHARED_BYTES];
  Shadow shadow[SHARED_BYTES / CELL];
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
static State state;

// Saves the callee-saved registers and the stack pointer to *from, and goes on at `to`.
extern "C" void emu_switch(void **from, void *to);
asm(R"(
    .text
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// Ends the launch; the fibers are abandoned where they are.
[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char *format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  const State &s = state;
  snprintf(state.message, state.message_bytes, "%d:block (%d, %d, %d), thread %d: %s", s.line,
           s.block.x, s.block.y, s.block.z, s.self ? s.self->index : -1, text);
  siglongjmp(state.out, 1);
}

inline void yield() { emu_switch(&state.self->stack_pointer, state.scheduler); }

inline uint64_t next_random() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return state.random;
}

// `ordered`: memory before the barrier is ordered before memory after it.
inline void arrive_and_wait(Barrier &barrier, int expected, int line, bool ordered) {
  Thread &self = *state.self;
  state.line = line;
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.line = line;
    barrier.first_thread = self.index;
  }
  if (barrier.line != line || barrier.expected != expected)
    fail("divergent barrier: thread %d waits for it at line %d", barrier.first_thread,
         barrier.line);
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    self.waiting = &barrier;
    self.generation = barrier.generation;
    yield();
    self.waiting = nullptr;
    state.line = line;
  }
  if (ordered) ++self.epoch;
}

inline void block_barrier(int line) {
  arrive_and_wait(state.barriers[0], state.block_dim.x, line, true);
}

inline void named_barrier(int id, int count, int line) {
  if (id < 0 || id > 15) fail("barrier %d does not exist", id);
  arrive_and_wait(state.barriers[id], count, line, true);
}

// Hands `bytes` of every lane of the warp to every other; returns the 32 slots of 64 bytes.
inline char (*exchange(const void *mine, int bytes, int line))[64] {
  Thread &self = *state.self;
  const int first = self.index / 32 * 32;
  const int lanes = state.block_dim.x - first < 32 ? state.block_dim.x - first : 32;
  Warp &warp = state.warps[self.index / 32];
  auto slots = warp.slots[self.exchanges++ % 2];
  memcpy(slots[self.index % 32], mine, bytes);
  // Not a memory barrier: a shuffle orders no shared memory.
  arrive_and_wait(warp.barrier, lanes, line, false);
  return slots;
}

// An operand of a tensor core may hold what nothing wrote, where a kernel drops the rows or columns
// that it makes: the poison shows in the others.
inline void check(const Buffer &buffer, const char *at, int bytes, int alignment, bool write,
                  bool operand = false) {
  const int64_t offset = at - buffer.base;
  const char *verb = write ? "write" : "read";
  if (offset < 0 || offset + bytes > buffer.bytes)
    fail("%s of %d bytes at byte %ld of %s, which has %ld", verb, bytes, (long)offset, buffer.name,
         (long)buffer.bytes);
  if (offset % alignment)
    fail("%s of %d bytes at byte %ld of %s is not aligned", verb, bytes, (long)offset, buffer.name);
  if (write && !buffer.writable) fail("write to %s, which the kernel only reads", buffer.name);
  const Thread &self = *state.self;
  if (!buffer.shared && !self.may_access)
    fail("%s of %s before the wait for the kernel before this one", verb, buffer.name);
  if (!buffer.shared) return;
  Shadow *cell = &state.shadow[(at - state.shared) / CELL];
  for (int i = 0; i < (bytes + CELL - 1) / CELL; ++i, ++cell) {
    const bool by_other = cell->writer >= 0 && cell->writer != self.index;
    if (by_other && cell->write_epoch == self.epoch)
      fail("%s of byte %ld of %s, which thread %d wrote since the last barrier", verb,
           (long)offset + i * CELL, buffer.name, cell->writer);
    if (!write) {
      if (cell->writer < 0 && !operand)
        fail("read of byte %ld of %s, which was never written", (long)offset + i * CELL,
             buffer.name);
      const bool again = cell->reader != -1 && cell->read_epoch == self.epoch;
      cell->reader = again && cell->reader != self.index ? -2 : self.index;
      cell->read_epoch = self.epoch;
    } else {
      if (cell->reader != -1 && cell->reader != self.index && cell->read_epoch == self.epoch)
        fail("write of byte %ld of %s, which another thread read since the last barrier",
             (long)offset + i * CELL, buffer.name);
      cell->writer = self.index;
      cell->write_epoch = self.epoch;
      cell->reader = -1;
    }
  }
}

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
  for (Buffer &buffer : state.shared_buffers)
    if (!strcmp(buffer.name, name)) return {&buffer, buffer.base};
  if (offset + bytes > state.shared_bytes)
    fail("%s ends at byte %ld of %ld of shared memory", name, (long)(offset + bytes),
         (long)state.shared_bytes);
  state.shared_buffers.push_back({name, state.shared + offset, bytes, true, true});
  return {&state.shared_buffers.back(), state.shared + offset};
}

// cp.async: the destination is undefined until the copy has been waited for.
inline void start_copy(Address<void> to, Address<const void> from, int bytes, int copied) {
  check(*to.buffer, to.at, bytes, bytes, true);
  if (copied) check(*from.buffer, from.at, copied, bytes, false);
  memset(to.at, POISON, bytes);
  state.self->open.push_back({to.buffer, from.buffer, to.at, from.at, bytes, copied});
}

inline void commit_copies() {
  state.self->groups.push_back(std::move(state.self->open));
  state.self->open.clear();
}

inline void finish(const std::vector<Copy> &copies) {
  for (const Copy &copy : copies) {
    check(*copy.to, copy.destination, copy.bytes, copy.bytes, true);
    memset(copy.destination, 0, copy.bytes);
    memcpy(copy.destination, copy.source, copy.copied);
  }
}

inline void wait_copies(int pending) {
  Thread &self = *state.self;
  const int ready = int(self.groups.size()) - pending;
  for (int i = 0; i < ready; ++i) finish(self.groups[i]);
  if (ready > 0) self.groups.erase(self.groups.begin(), self.groups.begin() + ready);
  if (pending == 0) {
    finish(self.open);
    self.open.clear();
  }
}

inline void fiber() {
  state.body(state.arguments);
  Thread &self = *state.self;
  if (!self.open.empty() || !self.groups.empty()) fail("cp.async that nothing waits for");
  self.done = true;
  yield();
}

inline void prepare(Thread &thread, int index) {
  char *stack = thread.stack;
  thread = Thread();
  thread.stack = stack ? stack : (char *)aligned_alloc(4096, STACK_BYTES);
  thread.index = index;
  thread.may_access = !state.dependent;
  // As if `fiber` had been called: six registers, its address, and the alignment of a call.
  void **top = (void **)(thread.stack + STACK_BYTES) - 1;
  *--top = (void *)fiber;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

inline void run_block() {
  const int count = state.block_dim.x;
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) {
    prepare(state.threads[i], i);
    order[i] = i;
  }
  for (Barrier &barrier : state.barriers) barrier = Barrier();
  for (Warp &warp : state.warps) warp.barrier = Barrier();
  state.shared_buffers.clear();
  state.shared_buffers.reserve(64);
  memset(state.shared, POISON, state.shared_bytes);
  for (int64_t i = 0; i < (state.shared_bytes + CELL - 1) / CELL; ++i)
    state.shadow[i] = {0, 0, -1, -1};
  for (int left = count; left;) {
    // Another order at every turn; seed 0 keeps that of the indices.
    if (state.random)
      for (int i = count - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
    bool progress = false;
    for (int index : order) {
      Thread &thread = state.threads[index];
      if (thread.done || (thread.waiting && thread.waiting->generation == thread.generation))
        continue;
      state.self = &thread;
      state.thread.x = index;
      emu_switch(&state.scheduler, thread.stack_pointer);
      progress = true;
      left -= thread.done;
    }
    if (progress) continue;
    for (const Thread &thread : state.threads)
      if (!thread.done && thread.waiting) {
        state.line = thread.waiting->line;
        state.self = &state.threads[thread.index];
        fail("divergent barrier: %d of %d threads have come, the others never will",
             thread.waiting->arrived, thread.waiting->expected);
      }
  }
}

inline void on_signal(int signal) {
  // Blocked while handled, and siglongjmp does not come back.
  if (signal == SIGALRM) fail("still running after the time limit");
  if (signal == SIGILL) fail("index of a register array out of its bounds");
  if (signal == SIGFPE) fail("integer division by zero");
  fail("access to memory that is not there");
}

constexpr int SIGNALS[] = {SIGALRM, SIGILL, SIGFPE, SIGSEGV, SIGBUS};

struct Tensor {
  const char *name;
  void *base;
  int64_t bytes;
  int32_t writable;
};

inline int launch(void (*body)(void **), const Tensor *tensors, int num_tensors, void **arguments,
                  const int32_t *grid, int block, int64_t shared_bytes, uint64_t seed, int seconds,
                  char *message, int message_bytes) {
  state.message = message;
  state.message_bytes = message_bytes;
  state.body = body;
  state.arguments = arguments;
  state.grid = {grid[0], grid[1], grid[2]};
  state.block_dim = {block, 1, 1};
  state.shared_bytes = shared_bytes;
  state.random = seed * 0x9e3779b97f4a7c15ull;
  state.self = nullptr;
  state.line = 0;
  state.buffers.clear();
  for (int i = 0; i < num_tensors; ++i)
    state.buffers.push_back({tensors[i].name, (char *)tensors[i].base, tensors[i].bytes, false,
                             tensors[i].writable != 0});
  struct sigaction before[5], action = {};
  action.sa_handler = on_signal;
  static char signal_stack[64 * 1024];
  stack_t alternate = {signal_stack, 0, sizeof signal_stack}, stack_before;
  sigaltstack(&alternate, &stack_before);
  action.sa_flags = SA_ONSTACK;
  for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &action, &before[i]);
  itimerval limit = {{0, 0}, {seconds, 0}}, none = {};
  setitimer(ITIMER_REAL, &limit, nullptr);
  const int failed = sigsetjmp(state.out, 1);
  if (!failed) {
    if (shared_bytes > SHARED_BYTES) fail("%ld bytes of shared memory", (long)shared_bytes);
    if (block < 1 || block > MAX_THREADS) fail("a CTA of %d threads", block);
    state.threads.resize(MAX_THREADS);
    state.warps.resize(MAX_THREADS / 32);
    for (int z = 0; z < grid[2]; ++z)
      for (int y = 0; y < grid[1]; ++y)
        for (int x = 0; x < grid[0]; ++x) {
          state.block = {x, y, z};
          run_block();
        }
  }
  setitimer(ITIMER_REAL, &none, nullptr);
  for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  return failed;
}

}  // namespace emu
