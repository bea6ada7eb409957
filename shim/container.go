package shim

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// container is what the decorator remembers of one container. Those that did
// not opt in have one too, with optedIn false, so that they answer promptly
// while the CRI call checkpoints them.
type container struct {
	id      string
	optedIn bool

	// Set once by Create.
	bundle      string
	spec        *specs.Spec
	annotations map[string]string
	identity    checkpoint.Identity
	settings    checkpoint.Settings
	fingerprint checkpoint.Fingerprint
	upper, work string
	request     *taskAPI.CreateTaskRequest // as containerd sent it, for a cold start after a failed restore

	tmpfs tmpfsGuard // of a restore

	mu sync.Mutex // guards what follows
	// restore is not nil between a Create that claimed a checkpoint and
	// whoever takes it to end the claim: Start, Delete, or Kill.
	restore *pendingRestore
	// restoredFrom is the manifest of the checkpoint that the container goes on from.
	restoredFrom *checkpoint.Manifest
	lazy         *lazyRestore // of the restore, where a pager fills memory
	mapped       bool         // memory is mapped from the template that it began from
	startedAt    time.Time
	pid          int   // of the first process, 0 before Start
	cgroup       group // nil before Start
	// busy names the operation that holds the container, and perhaps the inner
	// service's lock of it; while it is set, state answers for the inner service.
	busy      string
	state     *taskAPI.StateResponse
	dump      *dumpJob  // of a stop, the first and only one
	prepare   *dumpJob  // of a preparation for a reboot or of a template, set while busy is one of its operations
	signalled time.Time // when a signal was last delivered without a dump
	// settled is closed while the inner service has the container; it is open
	// during the exchange of a failed restore for a cold start, and while there
	// may be one.
	settled   chan struct{}
	exchanges int       // that are in progress, one within the other
	deletion  *deletion // set while busy is opDelete
	// replaced is closed when the inner object that waiters hang on goes away.
	replaced chan struct{}
}

// claim is the right to restore a checkpoint, a [store.Claim], or a template,
// a [store.Pin].
type claim interface {
	ID() checkpoint.ID
	Dir() string
	Manifest() *checkpoint.Manifest
	Verify(ctx context.Context, deferred store.Deferred) error
	Release(ctx context.Context) error
	Consume(ctx context.Context) error
	Quarantine(ctx context.Context, reason string, logs map[string][]byte) error
}

// pendingRestore is a claimed checkpoint and what was prepared from it.
type pendingRestore struct {
	claim   claim
	images  string // the directory with the images as this restore needs them; empty before there is one
	request restore.Request
	plan    *restore.Plan
	eager   string          // why CRIU reads the memory itself, "" where a pager may fill it
	start   *lazyStart      // of the pager, until it begins
	fresh   bool            // the writable layer was found empty, as it is to be left
	applied []layer.Applied // to the volumes, to be undone before a cold start
	begun   time.Time
	verify  time.Duration // that the checksums took
	phases  []event.Phase
	// unverified: the blocks of memory are yet to be checked, by the pager.
	unverified bool
	// mapped is the memory that is mapped from the claimed files, nil for none. Where
	// checked, its checksums have been compared before; else record is to be noted.
	mapped   *criu.MappedMemory
	checked  bool
	record   []byte
	unmapped string // why memory is not mapped although the pod asks for that
	ran      bool   // the container's tasks have run, and it is gone
}

// phase notes how long a part of the restore took.
func (p *pendingRestore) phase(name string, took time.Duration) {
	p.phases = append(p.phases, event.Phase{Name: name, Micros: took.Microseconds()})
}

// took is how long a part took, 0 where there was none.
func (p *pendingRestore) took(name string) (d time.Duration) {
	for _, part := range p.phases {
		if part.Name == name {
			d += time.Duration(part.Micros) * time.Microsecond
		}
	}
	return d
}

// deferred are the files that a pager checks as it reads them, those that were checked
// before another clone mapped them, and those that only such a clone needs.
func (p *pendingRestore) deferred(f checkpoint.File) bool {
	if f.OfMapped() {
		return p.checked || p.mapped == nil && p.unmapped == ""
	}
	return (p.unverified || p.checked) && f.Blocks != nil
}

// verifyAll checks what has been left to the pager, where there will be none.
func (p *pendingRestore) verifyAll(ctx context.Context) error {
	if !p.unverified {
		return nil
	}
	p.unverified = false
	begin := time.Now()
	defer func() { p.verify += time.Since(begin) }()
	if err := p.claim.Verify(ctx, nil); err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	return nil
}

// group is the cgroup of a container, as far as one needs it. Tests have their own.
type group interface {
	freeze(ctx context.Context) error
	leaveVfork(ctx context.Context) error
	thaw() error
	killAll() error
	pids() ([]uint32, error)
	stat() (any, error)
	memoryBytes() (int64, error)
}

func newContainer(id string) *container {
	c := &container{id: id, settled: make(chan struct{}), replaced: make(chan struct{})}
	close(c.settled)
	return c
}

// takeRestore makes the caller the one who ends the claim, if there is one.
func (c *container) takeRestore() *pendingRestore {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.restore
	c.restore = nil
	return p
}

// begin marks the container busy with op, unless it is already. state is what
// State answers meanwhile.
func (c *container) begin(op string, state *taskAPI.StateResponse) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy != "" {
		return false
	}
	c.busy, c.state = op, state
	return true
}

func (c *container) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy, c.state, c.prepare, c.deletion = "", nil, nil, nil
}

// turn makes one operation follow another, unless another one was faster.
func (c *container) turn(from, to string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy != from {
		return false
	}
	c.busy = to
	return true
}

// stopPeriod is how long a signal is taken for a stop that is under way, the
// usual grace period. That a signal asked for something else, as SIGHUP often
// does, cannot be told.
const stopPeriod = 30 * time.Second

// beginStopping is called before a signal is delivered without a dump. It
// refuses while the container is or may be frozen for a reboot or a template.
func (c *container) beginStopping() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.busy {
	case opPreparing, opPrepared, opAborting, opSnapshot:
		return false
	}
	c.signalled = time.Now()
	return true
}

// preparable returns the preparation for a reboot that there is, or an error
// where none can begin.
func (c *container) preparable() (*dumpJob, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.preparableLocked()
}

func (c *container) preparableLocked() (*dumpJob, error) {
	switch {
	case c.busy == opPreparing, c.busy == opPrepared:
		return c.prepare, nil
	case c.busy != "":
		return nil, busyError(c.busy)
	case c.dump != nil, !c.signalled.IsZero() && time.Since(c.signalled) < stopPeriod:
		return nil, fmt.Errorf("it is being stopped: %w", errdefs.ErrUnavailable)
	case c.startedAt.IsZero():
		return nil, fmt.Errorf("it was not started: %w", errdefs.ErrFailedPrecondition)
	}
	return nil, c.dumpableLocked()
}

// beginPreparing makes job the preparation, where preparable allows it.
func (c *container) beginPreparing(job *dumpJob, state *taskAPI.StateResponse) (other *dumpJob, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if other, err := c.preparableLocked(); other != nil || err != nil {
		return other, err
	}
	c.busy, c.state, c.prepare = opPreparing, state, job
	return nil, nil
}

// busyError is what a caller gets who comes during the operation.
func busyError(op string) error {
	if op == opPrepared {
		return fmt.Errorf("it is frozen, prepared for a reboot; `stasis prepare-reboot --abort` lets it go on: %w", errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s in progress, try again: %w", op, errdefs.ErrUnavailable)
}

// occupied returns the operation in progress, "" for none, and the state to answer.
func (c *container) occupied() (string, *taskAPI.StateResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.busy, c.state
}

// Operations that make a container busy, as an error names them.
const (
	opDump       = "dump"       // of a stop, to the end; or the end of one that is prepared
	opCheckpoint = "checkpoint" // the CRI call
	opPreparing  = "preparation for a reboot"
	opPrepared   = "reboot" // frozen, with a committed checkpoint
	opAborting   = "return from the preparation for a reboot"
	opSnapshot   = "dump for a template"
	opDelete     = "deletion"
)

// waitWhile returns when the container is busy with none of the operations.
func (c *container) waitWhile(ctx context.Context, ops ...string) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if op, _ := c.occupied(); !slices.Contains(ops, op) {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// beginExchange makes calls wait and waiters look again; the returned function
// ends it. An exchange may be part of another one, and calls wait for the end of
// both.
func (c *container) beginExchange() (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.exchanges++; c.exchanges == 1 {
		c.settled = make(chan struct{})
	}
	close(c.replaced)
	c.replaced = make(chan struct{})
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.exchanges--; c.exchanges == 0 {
			close(c.settled)
		}
	}
}

// exchanging tells whether an exchange is in progress.
func (c *container) exchanging() bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.exchanges > 0
}

// waitSettled returns when the inner service has the container, and the channel
// that tells when it no longer does.
func (c *container) waitSettled(ctx context.Context) (replaced <-chan struct{}, err error) {
	c.mu.Lock()
	settled, replaced := c.settled, c.replaced
	c.mu.Unlock()
	select {
	case <-settled:
		return replaced, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// leaveVfork is [cgroup.leaveVfork] of a container that is frozen.
func (c *container) leaveVfork(ctx context.Context) error {
	c.mu.Lock()
	cg := c.cgroup
	c.mu.Unlock()
	if cg == nil {
		return nil
	}
	return cg.leaveVfork(ctx)
}
