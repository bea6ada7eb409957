package shim

import (
	"context"
	"sync"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
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

	mu sync.Mutex // guards what follows
	// restore is not nil between a Create that claimed a checkpoint and
	// whoever takes it to end the claim: Start, Delete, or Kill.
	restore *pendingRestore
	// restoredFrom is the manifest of the checkpoint that the container goes on from.
	restoredFrom *checkpoint.Manifest
	startedAt    time.Time
	cgroup       *cgroup // nil before Start
	// busy names the operation that holds the inner service's lock of this
	// container; while it is set, state answers for the inner service.
	busy  string
	state *taskAPI.StateResponse
	dump  *dumpJob // the first and only one
	// settled is closed while the inner service has the container; it is open
	// during the exchange of a failed restore for a cold start.
	settled chan struct{}
	// replaced is closed when the inner object that waiters hang on goes away.
	replaced chan struct{}
}

// pendingRestore is a claimed checkpoint and what was prepared from it.
type pendingRestore struct {
	claim   *store.Claim
	stage   *store.Stage // holds the images as this restore needs them
	plan    *restore.Plan
	fresh   bool            // the writable layer was found empty, as it is to be left
	applied []layer.Applied // writable layer and volumes, to be undone before a cold start
	begun   time.Time
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
	c.busy, c.state = "", nil
}

// occupied returns the operation in progress, "" for none, and the state to answer.
func (c *container) occupied() (string, *taskAPI.StateResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.busy, c.state
}

// waitCheckpoint returns when no CRI checkpoint of an opted-in container is in
// progress: a stop signal that came then would be delivered without a dump.
func (c *container) waitCheckpoint(ctx context.Context) error {
	if !c.optedIn {
		return nil
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if op, _ := c.occupied(); op != opCheckpoint {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// opCheckpoint is the CRI call, as an operation that makes a container busy.
const opCheckpoint = "checkpoint"

// beginExchange makes calls wait and waiters look again; the returned function
// ends it.
func (c *container) beginExchange() (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	settled := make(chan struct{})
	c.settled = settled
	close(c.replaced)
	c.replaced = make(chan struct{})
	return func() { close(settled) }
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
