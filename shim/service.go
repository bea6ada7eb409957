package shim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

var empty = &emptypb.Empty{}

// service is the task service that containerd talks to. What it does not
// mention goes to the embedded inner service.
type service struct {
	taskAPI.TTRPCTaskService

	ctx       context.Context // the shim's lifetime
	config    Config
	publisher *publisher
	oom       func() *oomWatcher
	openStore func() (*store.Store, error)
	findGroup func(pid int, id string) (group, error)

	mu         sync.Mutex
	containers map[string]*container // guarded by mu
	clones     map[string]cloneLife  // guarded by mu; of ended clones, by container name
}

var _ shim.TTRPCService = (*service)(nil)

func newService(ctx context.Context, inner taskAPI.TTRPCTaskService, p *publisher, config Config) *service {
	return &service{
		TTRPCTaskService: inner,
		ctx:              ctx,
		config:           config,
		publisher:        p,
		// Both are made when used: a pod without checkpoints needs neither.
		oom: sync.OnceValue(func() *oomWatcher { return newOOMWatcher(ctx, p) }),
		// Each time anew: what is wrong with the store today may be repaired
		// long before the pod ends.
		openStore:  func() (*store.Store, error) { return store.Open(fsys.OS{}, config.Root) },
		findGroup:  func(pid int, id string) (group, error) { return loadCgroup(pid, id) },
		containers: make(map[string]*container),
		clones:     make(map[string]cloneLife),
	}
}

// RegisterTTRPC implements shim.TTRPCService.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	taskAPI.RegisterTTRPCTaskService(server, s)
	control.Register(server, s)
	return nil
}

func (s *service) lookup(id string) *container {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.containers[id]
}

// forget ends the record, unless there is another container by that name already.
func (s *service) forget(c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[c.id] == c {
		delete(s.containers, c.id)
	}
}

// settled looks the container up and waits until the inner service has it.
// Nil without an error means that the container is not known here.
func (s *service) settled(ctx context.Context, id string) (*container, error) {
	c := s.lookup(id)
	if c == nil {
		return nil, nil
	}
	_, err := c.waitSettled(ctx)
	return c, err
}

// free is settled, and refuses while an operation holds the container.
func (s *service) free(ctx context.Context, id string) (*container, error) {
	c, err := s.settled(ctx, id)
	if c == nil || err != nil {
		return nil, err
	}
	if op, _ := c.occupied(); op != "" {
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", id, busyError(op)))
	}
	return c, nil
}

// Create makes the container, from a checkpoint where the daemon named one
// that may be used.
func (s *service) Create(ctx context.Context, r *taskAPI.CreateTaskRequest) (*taskAPI.CreateTaskResponse, error) {
	ctx = withFields(ctx, log.Fields{"container_id": r.ID})
	annotations, err := readAnnotations(r.Bundle)
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("create container %q: %w", r.ID, err))
	}
	if d := s.lookup(r.ID).currentDeletion(); d != nil && !isClosed(d.done) {
		return nil, errgrpc.ToGRPC(fmt.Errorf("create container %q: %w", r.ID, busyError(opDelete)))
	}
	c := newContainer(r.ID)
	c.bundle, c.annotations, c.request = r.Bundle, annotations, r
	if _, ok := annotations[checkpoint.InternalPolicy]; ok && r.Checkpoint == "" {
		if err := s.optIn(c); err != nil {
			s.event(ctx, c, event.Event{Type: event.Ignored, Reason: err.Error(), ReasonCode: "invalid"})
		}
	}
	if _, ok := annotations[checkpoint.CRIUConfigAnnotation]; ok && !c.optedIn {
		// Only ours may reach CRIU: the file it names overrides everything.
		if err := setCRIUConfig(r.Bundle, ""); err != nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("create container %q: %w", r.ID, err))
		}
	}
	if c.optedIn {
		// A caller that gives up deletes what it has asked for, and is to find it:
		// else it would be made after that, and kept for ever.
		defer c.beginExchange()()
	}
	s.mu.Lock()
	s.containers[r.ID] = c
	s.mu.Unlock()
	resp, err := s.create(ctx, c)
	if err == nil && c.optedIn && ctx.Err() != nil {
		// Who waits no longer may have given up on the deletion, too.
		err = context.Cause(ctx)
		if uerr := s.uncreate(ctx, c); uerr != nil { // it is there, for a Delete to find
			return nil, errgrpc.ToGRPC(errors.Join(err, uerr))
		}
		err = errgrpc.ToGRPC(err)
	}
	if err != nil {
		s.forget(c)
		return nil, err
	}
	return resp, nil
}

// uncreate takes back what create has made.
func (s *service) uncreate(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.DeleteTimeout)
	defer cancel()
	_, err := s.TTRPCTaskService.Delete(ctx, &taskAPI.DeleteRequest{ID: c.id})
	s.abandonRestore(ctx, c)
	return errgrpc.ToNative(err)
}

func (s *service) create(ctx context.Context, c *container) (*taskAPI.CreateTaskResponse, error) {
	if !c.optedIn {
		return s.TTRPCTaskService.Create(ctx, c.request)
	}
	if id := cmp.Or(c.annotations[checkpoint.InternalCheckpointID], c.annotations[checkpoint.InternalTemplateVersion]); id != "" {
		resp, err := s.createRestored(ctx, c, id)
		if resp != nil || err != nil {
			return resp, err
		}
	}
	if err := c.writeCRIUConfig(s.dumpOptions(c)); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("create container %q: %w", c.id, err))
	}
	return s.TTRPCTaskService.Create(ctx, c.request)
}

// optIn fills in what a container under a policy needs.
func (s *service) optIn(c *container) error {
	var err error
	if c.settings, err = settingsOf(c.annotations); err != nil {
		return err
	}
	if !c.settings.OptedIn() {
		return nil
	}
	if c.identity, err = identityOf(c.annotations); err != nil {
		return err
	}
	if c.spec, err = readSpec(c.bundle); err != nil {
		return err
	}
	c.fingerprint = checkpoint.ComputeFingerprint(c.spec)
	if c.upper, c.work, err = overlayDirs(c.request.Rootfs); err != nil {
		return err
	}
	if err := setCRIUConfig(c.bundle, filepath.Join(c.bundle, criuConfigFile)); err != nil {
		return err
	}
	c.optedIn = true
	return nil
}

// Start starts the container or an exec process. A restore that fails here
// becomes a cold start, unless the pod asked for strictness.
func (s *service) Start(ctx context.Context, r *taskAPI.StartRequest) (*taskAPI.StartResponse, error) {
	ctx = withFields(ctx, log.Fields{"container_id": r.ID})
	if r.ExecID != "" {
		if _, err := s.free(ctx, r.ID); err != nil {
			return nil, err
		}
		return s.TTRPCTaskService.Start(ctx, r)
	}
	c, err := s.settled(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if c == nil || !c.optedIn {
		return s.TTRPCTaskService.Start(ctx, r)
	}
	var resp *taskAPI.StartResponse
	if p := c.takeRestore(); p != nil {
		resp, err = s.startRestored(ctx, c, p, r)
	} else {
		resp, err = s.TTRPCTaskService.Start(ctx, r)
	}
	if err != nil {
		return nil, err
	}
	cg, err := loadCgroup(int(resp.Pid), c.id)
	if err != nil {
		// The process may be gone already; the dump will load it again.
		log.G(ctx).WithError(err).Debug("no cgroup after start")
	}
	c.mu.Lock()
	c.startedAt, c.pid = time.Now(), int(resp.Pid)
	if cg != nil {
		c.cgroup = cg
	}
	restored := c.restoredFrom != nil
	c.mu.Unlock()
	if restored && cg != nil {
		s.oom().add(ctx, c.id, cg)
	}
	return resp, nil
}

// State answers from the record while an operation holds the inner service.
func (s *service) State(ctx context.Context, r *taskAPI.StateRequest) (*taskAPI.StateResponse, error) {
	if r.ExecID == "" {
		c, err := s.settled(ctx, r.ID)
		if err != nil {
			return nil, err
		}
		if c != nil {
			if op, state := c.occupied(); op != "" {
				return state, nil
			}
		}
	}
	return s.TTRPCTaskService.State(ctx, r)
}

// Pids answers from the cgroup while an operation holds the inner service.
func (s *service) Pids(ctx context.Context, r *taskAPI.PidsRequest) (*taskAPI.PidsResponse, error) {
	c, err := s.settled(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if cg := c.busyCgroup(); cg != nil {
		pids, err := cg.pids()
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		resp := &taskAPI.PidsResponse{}
		for _, p := range pids {
			resp.Processes = append(resp.Processes, &task.ProcessInfo{Pid: p})
		}
		return resp, nil
	}
	return s.TTRPCTaskService.Pids(ctx, r)
}

// Stats answers from the cgroup for restored containers, of which the inner
// service knows none.
func (s *service) Stats(ctx context.Context, r *taskAPI.StatsRequest) (*taskAPI.StatsResponse, error) {
	if c := s.lookup(r.ID); c.exchanging() {
		// Whoever asks about all containers of the node must not wait for a hook.
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s is being started: %w", r.ID, errdefs.ErrNotFound))
	}
	c, err := s.settled(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	var cg group
	if c != nil {
		c.mu.Lock()
		if c.restoredFrom != nil {
			cg = c.cgroup
		}
		c.mu.Unlock()
	}
	if cg == nil {
		return s.TTRPCTaskService.Stats(ctx, r)
	}
	stats, err := cg.stat()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	data, err := typeurl.MarshalAny(stats)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &taskAPI.StatsResponse{Stats: typeurl.MarshalProto(data)}, nil
}

// busyCgroup returns the cgroup when an operation holds the container.
func (c *container) busyCgroup() group {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy == "" {
		return nil
	}
	return c.cgroup
}

// Wait follows the container through the exchange of a failed restore for a
// cold start.
func (s *service) Wait(ctx context.Context, r *taskAPI.WaitRequest) (*taskAPI.WaitResponse, error) {
	c := s.lookup(r.ID)
	if c == nil || r.ExecID != "" {
		return s.TTRPCTaskService.Wait(ctx, r)
	}
	for {
		replaced, err := c.waitSettled(ctx)
		if err != nil {
			return nil, err
		}
		if state := c.beingDeleted(); state != nil {
			return &taskAPI.WaitResponse{ExitStatus: state.ExitStatus, ExitedAt: state.ExitedAt}, nil
		}
		resp, err := s.waitUntil(ctx, r, replaced)
		if err != nil && ctx.Err() == nil && isClosed(replaced) {
			continue
		}
		return resp, err
	}
}

func (s *service) waitUntil(ctx context.Context, r *taskAPI.WaitRequest, replaced <-chan struct{}) (*taskAPI.WaitResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with ctx, which this function cancels
		select {
		case <-replaced:
			cancel()
		case <-ctx.Done():
		}
	}()
	return s.TTRPCTaskService.Wait(ctx, r)
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// Kill dumps an opted-in container before its first stop signal is delivered.
func (s *service) Kill(ctx context.Context, r *taskAPI.KillRequest) (*emptypb.Empty, error) {
	ctx = withFields(ctx, log.Fields{"container_id": r.ID})
	c, err := s.settled(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if c == nil || r.ExecID != "" {
		return s.TTRPCTaskService.Kill(ctx, r)
	}
	if c.beingDeleted() != nil { // as the inner service answers of one that has ended
		switch unix.Signal(r.Signal) {
		case unix.SIGTERM, unix.SIGKILL:
			return empty, nil
		}
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: it has ended: %w", r.ID, errdefs.ErrNotFound))
	}
	switch unix.Signal(r.Signal) {
	case 0:
		return s.TTRPCTaskService.Kill(ctx, r)
	case unix.SIGKILL:
		s.abortDump(ctx, c)
		if c.turn(opPrepared, opDump) {
			return empty, s.killFrozen(ctx, c)
		}
		if p := c.takeRestore(); p != nil {
			return s.killUnstarted(ctx, c, p, r)
		}
		return s.TTRPCTaskService.Kill(ctx, r)
	}
	if !c.optedIn {
		return s.TTRPCTaskService.Kill(ctx, r)
	}
	var job *dumpJob
	var first bool
	for {
		// A signal that is delivered meanwhile would be dumped with the
		// container, or would stop it without a dump.
		if err := c.waitWhile(ctx, opCheckpoint, opPreparing, opAborting, opSnapshot); err != nil {
			return nil, err
		}
		if c.turn(opPrepared, opDump) {
			return empty, s.killFrozen(ctx, c)
		}
		if job, first = s.beginDump(ctx, c, r); job != nil {
			break
		}
		if c.beginStopping() {
			return s.TTRPCTaskService.Kill(ctx, r)
		}
	}
	if !first {
		// The stop is under way already; a dump that fails delivers its signal.
		select {
		case <-job.done:
			return s.TTRPCTaskService.Kill(ctx, r)
		default:
			return empty, nil
		}
	}
	select {
	case <-job.done:
		return empty, job.err
	case <-ctx.Done():
		// The caller went away; the job finishes or rolls back by itself.
		return nil, ctx.Err()
	}
}

// Checkpoint is the CRI call: the inner service does it, and the container
// goes on answering meanwhile.
func (s *service) Checkpoint(ctx context.Context, r *taskAPI.CheckpointTaskRequest) (*emptypb.Empty, error) {
	ctx = withFields(ctx, log.Fields{"container_id": r.ID})
	c, err := s.free(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return s.TTRPCTaskService.Checkpoint(ctx, r)
	}
	state, err := s.TTRPCTaskService.State(ctx, &taskAPI.StateRequest{ID: r.ID})
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if c.cgroup == nil && state.Pid > 0 {
		var cg group
		if cg, err = s.findGroup(int(state.Pid), c.id); err == nil {
			c.cgroup = cg
		}
	}
	undumpable := c.dumpableLocked()
	c.mu.Unlock()
	if err == nil {
		err = undumpable
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", r.ID, err))
	}
	if !c.begin(opCheckpoint, state) {
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: another checkpoint is in progress: %w", r.ID, errdefs.ErrUnavailable))
	}
	defer c.end()
	start := time.Now()
	if err := c.waitFull(ctx); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", r.ID, err))
	}
	if c.optedIn {
		// What the restore left there would be wrong here, if it could not be replaced then.
		if err := c.writeCRIUConfig(s.dumpOptions(c)); err != nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", r.ID, err))
		}
	}
	if state.Status == task.Status_PAUSED {
		// containerd pauses before it checkpoints.
		if err := c.leaveVfork(ctx); err != nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", r.ID, err))
		}
	}
	if _, err = s.TTRPCTaskService.Checkpoint(ctx, r); err != nil {
		log.G(ctx).WithError(err).Warn("checkpoint failed")
		return nil, err
	}
	log.G(ctx).WithFields(log.Fields{"op": "checkpoint", "duration_ms": time.Since(start).Milliseconds()}).Info("container checkpointed")
	return empty, nil
}

// What follows needs the inner service's lock of the container, so it is
// refused, with an error that asks to try again, while an operation holds it.

func (s *service) Exec(ctx context.Context, r *taskAPI.ExecProcessRequest) (*emptypb.Empty, error) {
	if _, err := s.free(ctx, r.ID); err != nil {
		return nil, err
	}
	return s.TTRPCTaskService.Exec(ctx, r)
}

func (s *service) Pause(ctx context.Context, r *taskAPI.PauseRequest) (*emptypb.Empty, error) {
	if _, err := s.free(ctx, r.ID); err != nil {
		return nil, err
	}
	return s.TTRPCTaskService.Pause(ctx, r)
}

func (s *service) Resume(ctx context.Context, r *taskAPI.ResumeRequest) (*emptypb.Empty, error) {
	if _, err := s.free(ctx, r.ID); err != nil {
		return nil, err
	}
	return s.TTRPCTaskService.Resume(ctx, r)
}

func (s *service) Update(ctx context.Context, r *taskAPI.UpdateTaskRequest) (*emptypb.Empty, error) {
	if _, err := s.free(ctx, r.ID); err != nil {
		return nil, err
	}
	return s.TTRPCTaskService.Update(ctx, r)
}

func (s *service) ResizePty(ctx context.Context, r *taskAPI.ResizePtyRequest) (*emptypb.Empty, error) {
	if r.ExecID == "" {
		if _, err := s.free(ctx, r.ID); err != nil {
			return nil, err
		}
	}
	return s.TTRPCTaskService.ResizePty(ctx, r)
}

// event writes to the node's log; a failure to do so is only logged, for it
// must not change what happens to the container.
func (s *service) event(ctx context.Context, c *container, e event.Event) {
	if c.identity.Namespace != "" {
		i := c.identity
		e.Identity = &i
	}
	e.ContainerID = c.id
	e.PodName, e.PodUID, e.SandboxID = c.annotations[checkpoint.CRISandboxName], c.annotations[checkpoint.CRISandboxUID], c.annotations[checkpoint.CRISandboxID]
	l := log.G(ctx).WithFields(log.Fields{
		"sandbox_id": e.SandboxID, "checkpoint_id": e.CheckpointID, "op": e.Type,
		"duration_ms": e.DurationMicros / 1000, "size_bytes": e.SizeBytes,
	})
	switch e.Type {
	case event.Dumped:
		l.Info("container dumped")
	case event.Restored:
		l.Info("container restored")
	case event.Removed:
		l.WithField("reason", e.Reason).Info("checkpoint removed")
	default:
		l.WithField("reason", e.Reason).Warn("stasis did not act")
	}
	err := event.Append(s.config.Root, e)
	if err != nil {
		log.G(ctx).WithError(err).Warn("event not written")
	}
}

// reasonCode maps an error to one of the codes of package event.
func reasonCode(err error) string {
	switch {
	case errors.Is(err, errHook): // whatever made it fail
		return "hook"
	case errors.Is(err, errAborted), errors.Is(err, errCalledOff):
		return "aborted"
	case errors.Is(err, checkpoint.ErrCorrupt):
		return "corrupt"
	case errors.Is(err, checkpoint.ErrNotFound):
		return "missing"
	case errors.Is(err, checkpoint.ErrIncompatible):
		return "incompatible"
	case errors.Is(err, checkpoint.ErrNoSpace), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return "no-space"
	case errors.Is(err, checkpoint.ErrUnsupported):
		return "unsupported"
	case errors.Is(err, checkpoint.ErrBusy):
		return "busy"
	case errors.Is(err, checkpoint.ErrInvalid):
		return "invalid"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return "timeout"
	case errors.Is(err, errCRIU):
		return "criu"
	}
	return "internal"
}

func withFields(ctx context.Context, f log.Fields) context.Context {
	return log.WithLogger(ctx, log.G(ctx).WithFields(f))
}
