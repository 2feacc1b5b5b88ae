// Runs the threads and checks their accesses. Compiled once, and linked into each kernel's library.
#include "runtime.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/time.h>

namespace emu {

State state;

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

void fail(const char *format, ...) {
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

static void yield() { emu_switch(&state.self->stack_pointer, state.scheduler); }

static uint64_t next_random() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return state.random;
}

// What the self knows, and that all lanes of its warp come to the barrier with it, or, if not
// `whole`, only what they did before the last one that they passed together.
static void publish(Clock &clock, bool whole) {
  const Thread &self = *state.self;
  clock.join(self.seen);
  uint32_t &own = clock.passed[self.index / 32];
  if (own < self.passed + whole) own = self.passed + whole;
}

// `ordered`: memory before the barrier is ordered before memory after it.
static void arrive_and_wait(Barrier &barrier, int expected, int line, bool ordered,
                            bool from_one_statement = true) {
  Thread &self = *state.self;
  state.line = line;
  Clock &clock = barrier.clocks[barrier.generation % 2];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.line = line;
    barrier.first_thread = self.index;
    if (ordered) clock = Clock();
  }
  if ((from_one_statement && barrier.line != line) || barrier.expected != expected)
    fail("divergent barrier: thread %d waits for it at line %d", barrier.first_thread,
         barrier.line);
  if (ordered) publish(clock, true);
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
  if (!ordered) return;
  self.seen.join(clock);
  ++self.passed;
}

void block_barrier(int line) {
  arrive_and_wait(state.cta->barriers[0], state.block_dim.x, line, true);
}

void cluster_barrier(int line) {
  arrive_and_wait(state.cluster_barrier, state.block_dim.x * state.cluster, line, true);
}

static int lanes_of_warp() {
  const int first = state.self->index / 32 * 32;
  return state.block_dim.x - first < 32 ? state.block_dim.x - first : 32;
}

void named_barrier(int id, int count, int line) {
  if (id < 0 || id > 15) fail("barrier %d does not exist", id);
  Warp &warp = state.cta->warps[state.self->index / 32];
  if (warp.arrived[id] == 0) warp.line[id] = line;
  if (warp.line[id] != line)
    fail("divergent barrier: another lane of the warp waits for it at line %d", warp.line[id]);
  warp.arrived[id] = (warp.arrived[id] + 1) % lanes_of_warp();
  arrive_and_wait(state.cta->barriers[id], count, line, true, false);
}

void warp_barrier(int line) {
  // What other warps do is ordered for all lanes by what any of them knows.
  arrive_and_wait(state.cta->warps[state.self->index / 32].barrier, lanes_of_warp(), line, true);
}

char (*exchange(const void *mine, int bytes, int line))[64] {
  Thread &self = *state.self;
  Warp &warp = state.cta->warps[self.index / 32];
  auto slots = warp.slots[self.exchanges++ % 2];
  memcpy(slots[self.index % 32], mine, bytes);
  // Not a memory barrier: a shuffle orders no shared memory.
  arrive_and_wait(warp.barrier, lanes_of_warp(), line, false);
  return slots;
}

// Whether one that is not the self has read the cell, and no barrier is between. If not, then who has
// is forgotten: who is ordered after the self is after them, too.
template <typename AtOnce>
static bool read_at_once(Cta &cta, Shadow &cell, const Thread &self, AtOnce at_once) {
  if (cell.reader == -1 || cell.reader == self.index) return false;
  if (cell.reader != -2) {
    const int warp = cell.reader >= 0 ? cell.reader / 32 : -3 - cell.reader;
    return at_once(warp, cell.read);
  }
  const Readers &readers = cta.readers[cell.read];
  for (int warp = 0; warp < MAX_WARPS; ++warp) {
    const auto &one = readers.of[warp];
    if (one.thread != -1 && one.thread != self.index && at_once(warp, one.passed)) return true;
  }
  cta.free_readers.push_back(cell.read);
  return false;
}

template <typename AtOnce>
static void note_read(Cta &cta, Shadow &cell, const Thread &self, AtOnce at_once) {
  const int warp = self.index / 32;
  if (cell.reader == self.index && cell.read == self.passed) return;
  if (!read_at_once(cta, cell, self, at_once)) {
    cell.reader = self.index;
    cell.read = self.passed;
    return;
  }
  const int before = cell.reader >= 0 ? cell.reader / 32 : -3 - cell.reader;
  if (cell.reader != -2 && before == warp) {
    cell.reader = -3 - warp;
    cell.read = self.passed;
    return;
  }
  if (cell.reader != -2) {
    if (cta.free_readers.empty()) {
      cta.free_readers.push_back(cta.readers.size());
      cta.readers.emplace_back();
    }
    const uint32_t at = cta.free_readers.back();
    cta.free_readers.pop_back();
    for (auto &one : cta.readers[at].of) one.thread = -1;
    cta.readers[at].of[before] = {cell.read, int16_t(cell.reader >= 0 ? cell.reader : -2)};
    cell.reader = -2;
    cell.read = at;
  }
  auto &own = cta.readers[cell.read].of[warp];
  const bool others = own.thread != -1 && own.thread != self.index && own.passed == self.passed;
  own = {self.passed, int16_t(others ? -2 : self.index)};
}

void check(const Buffer &buffer, const char *at, int bytes, int alignment, bool write,
           bool operand) {
  const int64_t offset = at - buffer.base;
  const char *verb = write ? "write" : "read";
  if (offset < 0 || offset + bytes > buffer.bytes)
    fail("%s of %d bytes at byte %ld of %s, which has %ld", verb, bytes, (long)offset, buffer.name,
         (long)buffer.bytes);
  if (offset % alignment)
    fail("%s of %d bytes at byte %ld of %s is not aligned", verb, bytes, (long)offset, buffer.name);
  if (write && !buffer.writable) fail("write to %s, which the kernel only reads", buffer.name);
  const Thread &self = *state.self;
  if (!buffer.shared && !self.may_access && !buffer.early)
    fail("%s of %s before the wait for the kernel before this one", verb, buffer.name);
  if (!buffer.shared) return;
  Cta &cta = *buffer.shared;
  const int warp = self.index / 32;
  const auto at_once = [&](int other, uint32_t passed) {
    return passed >= (other == warp ? self.passed : self.seen.passed[other]);
  };
  Shadow *cell = &cta.shadow[(at - cta.shared) / CELL];
  for (int i = 0; i < (bytes + CELL - 1) / CELL; ++i, ++cell) {
    const long byte = offset + i * CELL;
    if (cell->writer == COMING)
      fail("%s of byte %ld of %s, to which a copy is under way", verb, byte, buffer.name);
    if (cell->writer >= 0 && cell->writer != self.index &&
        at_once(cell->writer / 32, cell->written))
      fail("%s of byte %ld of %s, which thread %d wrote since the last barrier", verb, byte,
           buffer.name, cell->writer);
    if (!write) {
      if (cell->writer == -1 && !operand)
        fail("read of byte %ld of %s, which was never written", byte, buffer.name);
      note_read(cta, *cell, self, at_once);
    } else {
      if (read_at_once(cta, *cell, self, at_once))
        fail("write of byte %ld of %s, which another thread read since the last barrier", byte,
             buffer.name);
      cell->writer = self.index;
      cell->written = self.passed;
      cell->reader = -1;
    }
  }
}

Mbarrier *mbarriers(int count) {
  if (count > MAX_MBARRIERS) fail("more mbarriers than are emulated");
  return state.cta->mbarriers;
}

static void forget_readers(Cta &cta, Shadow &cell) {
  if (cell.reader == -2) cta.free_readers.push_back(cell.read);
  cell.reader = -1;
}

// The mbarrier of the other CTA; what comes is in its `pushes` until it is waited for. `stays` is
// where it must not change meanwhile, if anywhere.
static Mbarrier &push_bytes(Address<void> to, const char *from, int rank, int bytes,
                            Mbarrier &mine, const char *stays) {
  if (rank < 0 || rank >= state.cluster) fail("the cluster has no CTA %d", rank);
  Cta &cta = *state.cta, &other = *state.ctas[rank];
  Mbarrier &full = other.mbarriers[&mine - cta.mbarriers];
  if (!other.left) fail("copy to a CTA that has left");
  if (!full.barrier.expected) fail("mbarrier without a count");
  const int whole = bytes == 4 ? 4 : 16;  // one number, or vectors
  if ((to.at - to.buffer->base) % whole || bytes % whole)
    fail("copy is not aligned to %d bytes", whole);
  Buffer *there = &other.shared_buffers[to.buffer - cta.shared_buffers.data()];
  char *destination = there->base + (to.at - to.buffer->base);
  if (to.at < to.buffer->base || to.at + bytes > to.buffer->base + to.buffer->bytes)
    fail("copy to %s is out of its bounds", there->name);
  for (int i = 0; i < bytes / CELL; ++i) {
    Shadow &cell = other.shadow[(destination - other.shared) / CELL + i];
    if (cell.writer == COMING) fail("two copies to %s, no wait between", there->name);
    cell.writer = COMING;
    forget_readers(other, cell);
  }
  memset(destination, POISON, bytes);
  full.pushes.push_back({&cta, there, destination, stays, {from, from + bytes},
                         full.barrier.generation});
  return full;
}

void push(Address<void> to, Address<const void> from, int rank, int bytes,
          Mbarrier &mine) {
  check(*from.buffer, from.at, bytes, 16, false);
  push_bytes(to, from.at, rank, bytes, mine, from.at).arrive();
}

void push_registers(Address<void> to, const void *from, int rank, int bytes, Mbarrier &mine) {
  push_bytes(to, (const char *)from, rank, bytes, mine, nullptr).come(-bytes);
}

void Mbarrier::come(int count) {
  // What a CTA sends to itself comes after what it knows; of other CTAs' warps nothing is kept.
  Cta &cta = *state.cta;
  if (this >= cta.mbarriers && this < cta.mbarriers + MAX_MBARRIERS) {
    Clock &clock = barrier.clocks[barrier.generation % 2];
    publish(clock, false);
  }
  bytes += count;
  if (barrier.arrived != barrier.expected) return;
  if (bytes < 0) fail("more bytes have come to an mbarrier than were announced");
  if (bytes) return;
  barrier.arrived = 0;
  ++barrier.generation;
  // Who waits for a phase knows what all know who came to it, and to those before.
  barrier.clocks[barrier.generation % 2] = barrier.clocks[(barrier.generation + 1) % 2];
}

void Mbarrier::arrive() {
  if (!barrier.expected) fail("mbarrier without a count");
  if (barrier.arrived == barrier.expected) fail("one arrival more than the mbarrier counts");
  ++barrier.arrived;
  come(0);
}

void Mbarrier::arrive_and_expect_tx(int count) {
  bytes += count;
  arrive();
}

void Mbarrier::wait(uint32_t parity) {
  Thread &self = *state.self;
  if (!barrier.expected) fail("mbarrier without a count");
  barrier.line = state.line;
  while ((barrier.generation & 1) == parity) {
    self.waiting = &barrier;
    self.generation = barrier.generation;
    yield();
    self.waiting = nullptr;
    state.line = barrier.line;
  }
  self.seen.join(barrier.clocks[(barrier.generation + 1) % 2]);
  std::vector<Push> rest;
  for (Push &push : pushes) {
    if (push.phase >= barrier.generation) {
      rest.push_back(push);
      continue;
    }
    if (push.source && !push.from->left)
      fail("a CTA has left before what it copied was waited for");
    if (push.source && memcmp(push.source, push.bytes.data(), push.bytes.size()))
      fail("what was copied to %s changed before the copy was waited for", push.to->name);
    memcpy(push.destination, push.bytes.data(), push.bytes.size());
    Cta &cta = *state.cta;
    for (size_t i = 0; i < push.bytes.size() / CELL; ++i) {
      Shadow &cell = cta.shadow[(push.destination - cta.shared) / CELL + i];
      cell.writer = COPIED;
    }
  }
  pushes = rest;
}

void start_copy(Address<void> to, Address<const void> from, int bytes, int copied) {
  check(*to.buffer, to.at, bytes, bytes, true);
  if (copied) check(*from.buffer, from.at, copied, bytes, false);
  memset(to.at, POISON, bytes);
  state.self->open.push_back({to.buffer, from.buffer, to.at, from.at, bytes, copied});
}

void commit_copies() {
  state.self->groups.push_back(std::move(state.self->open));
  state.self->open.clear();
}

static void finish(const std::vector<Copy> &copies) {
  for (const Copy &copy : copies) {
    check(*copy.to, copy.destination, copy.bytes, copy.bytes, true);
    memset(copy.destination, 0, copy.bytes);
    memcpy(copy.destination, copy.source, copy.copied);
  }
}

void wait_copies(int pending) {
  Thread &self = *state.self;
  const int ready = int(self.groups.size()) - pending;
  for (int i = 0; i < ready; ++i) finish(self.groups[i]);
  if (ready > 0) self.groups.erase(self.groups.begin(), self.groups.begin() + ready);
  if (pending == 0) {
    finish(self.open);
    self.open.clear();
  }
}

static void fiber() {
  state.body(state.arguments);
  Thread &self = *state.self;
  for (const auto &group : self.groups)
    if (!group.empty()) fail("cp.async that nothing waits for");
  if (!self.open.empty()) fail("cp.async that nothing waits for");
  self.done = true;
  yield();
}

static void prepare(Thread &thread, int index) {
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

static void prepare(Cta &cta) {
  const int count = state.block_dim.x;
  cta.threads.resize(MAX_THREADS);
  cta.warps.resize(MAX_THREADS / 32);
  for (int i = 0; i < count; ++i) prepare(cta.threads[i], i);
  cta.left = count;
  for (Barrier &barrier : cta.barriers) barrier = Barrier();
  for (Mbarrier &barrier : cta.mbarriers) barrier = Mbarrier();
  for (Warp &warp : cta.warps) {
    warp.barrier = Barrier();
    memset(warp.arrived, 0, sizeof warp.arrived);
  }
  cta.shared_buffers.clear();
  cta.shared_buffers.reserve(64);
  memset(cta.shared, POISON, state.shared_bytes);
  for (int64_t i = 0; i < (state.shared_bytes + CELL - 1) / CELL; ++i)
    cta.shadow[i] = {0, 0, -1, -1};
  cta.readers.clear();
  cta.free_readers.clear();
}

// All CTAs of a cluster at once, from `block` on; without clusters, one.
static void run_cluster(Dim block) {
  const int count = state.block_dim.x, all = count * state.cluster;
  std::vector<int> order(all);
  for (int i = 0; i < all; ++i) order[i] = i;
  for (int rank = 0; rank < state.cluster; ++rank) {
    prepare(*state.ctas[rank]);
    state.ctas[rank]->block = {block.x + rank, block.y, block.z};
  }
  state.cluster_barrier = Barrier();
  int stopped = -1;
  for (int left = all, turn = 0; left; ++turn) {
    // Another order at every turn; seed 0 keeps that of the indices.
    if (state.random)
      for (int i = all - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
    // For some turns one CTA stands still: the others get as far ahead as their barriers let them.
    if (state.random && state.cluster > 1 && turn % 8 == 0)
      stopped = next_random() % state.cluster;
    bool progress = false;
    for (int at : order) {
      Cta &cta = *state.ctas[at / count];
      Thread &thread = cta.threads[at % count];
      if (at / count == stopped || thread.done ||
          (thread.waiting && thread.waiting->generation == thread.generation))
        continue;
      state.self = &thread;
      state.cta = &cta;
      state.block = cta.block;
      state.thread.x = thread.index;
      emu_switch(&state.scheduler, thread.stack_pointer);
      progress = true;
      left -= thread.done;
      cta.left -= thread.done;
    }
    if (progress) continue;
    if (stopped >= 0) {
      stopped = -1;
      continue;
    }
    for (auto &cta : state.ctas)
      for (Thread &thread : cta->threads)
        if (!thread.done && thread.waiting) {
          state.line = thread.waiting->line;
          state.self = &thread;
          state.block = cta->block;
          fail("divergent barrier: %d of %d threads have come, the others never will",
               thread.waiting->arrived, thread.waiting->expected);
        }
  }
}

static void on_signal(int signal) {
  // Blocked while handled, and siglongjmp does not come back.
  if (signal == SIGALRM) fail("still running after the time limit");
  if (signal == SIGILL) fail("index of a register array out of its bounds");
  if (signal == SIGFPE) fail("integer division by zero");
  fail("access to memory that is not there");
}

constexpr int SIGNALS[] = {SIGALRM, SIGILL, SIGFPE, SIGSEGV, SIGBUS};

int launch(void (*body)(void **), const Tensor *tensors, int num_tensors, void **arguments,
           const int32_t *grid, int block, int cluster, int64_t shared_bytes, uint64_t seed,
           int seconds, char *message, int message_bytes) {
  state.message = message;
  state.message_bytes = message_bytes;
  state.body = body;
  state.arguments = arguments;
  state.grid = {grid[0], grid[1], grid[2]};
  state.block_dim = {block, 1, 1};
  state.cluster = cluster;
  state.shared_bytes = shared_bytes;
  state.random = seed * 0x9e3779b97f4a7c15ull;
  state.self = nullptr;
  state.line = 0;
  state.buffers.clear();
  for (int i = 0; i < num_tensors; ++i)
    state.buffers.push_back({tensors[i].name, (char *)tensors[i].base, tensors[i].bytes, nullptr,
                             tensors[i].writable != 0, tensors[i].early != 0});
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
    if (cluster < 1 || cluster > MAX_CLUSTER || grid[0] % cluster) fail("a cluster of %d", cluster);
    while (int(state.ctas.size()) < cluster) state.ctas.push_back(std::make_unique<Cta>());
    for (int z = 0; z < grid[2]; ++z)
      for (int y = 0; y < grid[1]; ++y)
        for (int x = 0; x < grid[0]; x += cluster) run_cluster({x, y, z});
  }
  setitimer(ITIMER_REAL, &none, nullptr);
  for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  return failed;
}

}  // namespace emu
