package shim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// The service implements [control.Server]: a container is dumped without being
// stopped and stays frozen, until the node goes down or the reboot is called off.
//
//	running ── Prepare ──▶ opPreparing ──▶ opPrepared ── Kill, or the shim's end ──▶ dead, record kept
//	   ▲                        │              │
//	   ├── failure, Abort ──────┘              │
//	   └───── record removed ── opAborting ◀── Abort
//
// Who comes in between:
//
//   - A stop signal that comes during opPreparing or opAborting waits for its
//     end. After opPrepared it kills the frozen container and keeps the record,
//     whatever the policy is; after a failure it is what it would be anyway.
//   - SIGKILL ends opPreparing as it ends any dump. After opPrepared it is
//     like a stop signal.
//   - A container that is being dumped for a stop, or got a signal in the last
//     stopPeriod, is refused: it ends by itself, or can be prepared later.
var _ control.Server = (*service)(nil)

// rebootReason is what the events of these dumps have as reason.
const rebootReason = "node reboot"

var errCalledOff = errors.New("the reboot was called off")

// enrolled looks up a container that opted in.
func (s *service) enrolled(ctx context.Context, id string) (*container, error) {
	c, err := s.settled(ctx, id)
	if err != nil {
		return nil, err
	}
	if c == nil || !c.optedIn {
		return nil, fmt.Errorf("container %q is unknown or did not opt in: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// Status implements [control.Server]. It asks only the kernel, never the inner
// service, whose lock a dump may hold for long.
func (s *service) Status(ctx context.Context, id string) (control.Status, error) {
	c, err := s.enrolled(ctx, id)
	if err != nil {
		return control.Status{}, err
	}
	st := control.Status{
		State: control.Stopped, Identity: c.identity, Settings: c.settings,
		PodName: c.annotations[checkpoint.CRISandboxName], PodUID: c.annotations[checkpoint.CRISandboxUID],
	}
	c.mu.Lock()
	op, pid, cg, job := c.busy, c.pid, c.cgroup, c.prepare
	c.mu.Unlock()
	if cg == nil || !alive(cg) {
		return st, nil
	}
	st.PID = pid
	if st.MemoryBytes, err = cg.memoryBytes(); err != nil {
		log.G(ctx).WithField("container_id", id).WithError(err).Debug("memory in use")
	}
	switch op {
	case "":
		st.State = control.Running
	case opPrepared:
		st.State, st.CheckpointID = control.Prepared, job.result.CheckpointID
	default:
		st.State = control.Busy
	}
	return st, nil
}

// alive tells whether there is a process: the cgroup goes with the last one.
func alive(cg group) bool {
	pids, err := cg.pids()
	return err == nil && len(pids) > 0
}

// Prepare implements [control.Server]. The work is detached from the call: a
// caller that goes away gets the container prepared or running, not less, and
// learns which by calling again.
func (s *service) Prepare(ctx context.Context, id string) (control.Result, error) {
	ctx = withFields(ctx, log.Fields{"container_id": id})
	c, err := s.enrolled(ctx, id)
	if err != nil {
		return control.Result{}, err
	}
	job, first, err := s.beginPrepare(ctx, c)
	if err == nil {
		select {
		case <-job.done:
			err = job.err
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return control.Result{}, fmt.Errorf("prepare container %s: %w", id, err)
	}
	r := job.result
	r.Already = !first
	return r, nil
}

// beginPrepare begins a Prepare, or returns the one that there is.
func (s *service) beginPrepare(ctx context.Context, c *container) (job *dumpJob, first bool, err error) {
	if !c.settings.KeepsRecords() {
		return nil, false, fmt.Errorf("its policy is %q: %w", c.settings.Policy, errdefs.ErrFailedPrecondition)
	}
	if err := c.waitWhile(ctx, opCheckpoint, opAborting, opSnapshot); err != nil {
		return nil, false, err
	}
	if job, err := c.preparable(); job != nil || err != nil {
		return job, false, err
	}
	state, err := s.running(ctx, c)
	if err != nil {
		return nil, false, err
	}
	job, life, deadline := s.newJob(ctx)
	if other, err := c.beginPreparing(job, state); other != nil || err != nil {
		job.cancel(nil)
		return other, false, err
	}
	go func() { // ends with the container, with Abort or with the shim
		defer job.cancel(nil)
		job.result, job.err = s.detached(life, deadline, c, int(state.Pid), dumpMode{reboot: true})
		if job.err != nil {
			c.end()
			close(job.done)
			return
		}
		c.turn(opPreparing, opPrepared)
		close(job.done)
		// Who is frozen can still be killed by others: by the administrator, by
		// the kernel for want of memory.
		_, err := s.TTRPCTaskService.Wait(life, &taskAPI.WaitRequest{ID: c.id})
		if err == nil && c.waitWhile(life, opAborting) == nil && c.turn(opPrepared, opDump) {
			c.killGroup(life) // its cgroup is still frozen
			c.end()
		}
	}()
	return job, true, nil
}

// running returns the state of a container that runs, and an error for others.
func (s *service) running(ctx context.Context, c *container) (*taskAPI.StateResponse, error) {
	state, err := s.TTRPCTaskService.State(ctx, &taskAPI.StateRequest{ID: c.id})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	if state.Status != task.Status_RUNNING {
		return nil, fmt.Errorf("it is %s, not running: %w", state.Status, errdefs.ErrFailedPrecondition)
	}
	return state, nil
}

// detached is the dump of a job, of which control tells.
func (s *service) detached(ctx context.Context, deadline time.Time, c *container, pid int, mode dumpMode) (control.Result, error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	start := time.Now()
	m, err := s.dump(ctx, c, pid, mode)
	if err != nil {
		return control.Result{}, err
	}
	return control.Result{
		CheckpointID: m.ID, SizeBytes: m.Sizes.TotalBytes, Duration: time.Since(start), Timings: m.Timings,
	}, nil
}

// Abort implements [control.Server]. Where the record cannot be removed the
// container stays frozen, for it must not go on and be restored as well. That
// holds for a record that another container has just claimed, too: it may give
// it back. A record that is gone was removed by the operator or by GC, or
// another container of the same identity, created although this one was there,
// goes on from it; these cannot be told apart, and this one goes on.
func (s *service) Abort(ctx context.Context, id string) error {
	ctx = withFields(ctx, log.Fields{"container_id": id})
	c, err := s.enrolled(ctx, id)
	if err != nil {
		return err
	}
	for {
		if err := c.waitWhile(ctx, opAborting); err != nil {
			return fmt.Errorf("abort container %s: %w", id, err)
		}
		c.mu.Lock()
		op, job, cg := c.busy, c.prepare, c.cgroup
		c.mu.Unlock()
		switch {
		case op == opPreparing:
			job.cancel(errCalledOff)
			select {
			case <-job.done: // it failed, or was done already
			case <-ctx.Done():
				return fmt.Errorf("abort container %s: %w", id, ctx.Err())
			}
		case op != opPrepared || !alive(cg):
			return nil // it runs, or will not go on in any case
		case c.turn(opPrepared, opAborting):
			if err := s.letGoOn(ctx, c, job); err != nil {
				c.turn(opAborting, opPrepared)
				return fmt.Errorf("abort container %s: it stays frozen: %w", id, err)
			}
			return nil
		}
	}
}

// letGoOn removes the record and thaws, whether or not the caller stays. After
// an error it may be called again.
func (s *service) letGoOn(ctx context.Context, c *container, job *dumpJob) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	st, err := s.openStore()
	if err != nil {
		return err
	}
	id := job.result.CheckpointID
	if err := st.Remove(ctx, id); err != nil && !errors.Is(err, checkpoint.ErrNotFound) {
		return err
	}
	c.mu.Lock()
	cg := c.cgroup
	c.mu.Unlock()
	if err := thaw(cg); err != nil {
		return err
	}
	c.end()
	job.cancel(nil)
	s.event(ctx, c, event.Event{Type: event.Removed, CheckpointID: id, Reason: errCalledOff.Error()})
	return nil
}

// killPrepared kills what is prepared when the shim is told to end, as it is
// when the node goes down: nobody would be left to thaw it or to tell of its
// exit, and systemd would wait in vain for frozen processes to heed SIGTERM.
func (s *service) killPrepared(ctx context.Context) error {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.containers))
	s.mu.Unlock()
	for _, c := range all {
		if c.turn(opPrepared, opDump) {
			c.killGroup(ctx)
		}
	}
	return nil
}
