package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

var (
	errAborted = errors.New("aborted by SIGKILL")
	errCRIU    = errors.New("CRIU failed")
)

// logLines is how much of CRIU's log a reason quotes: the first error is the
// cause, and a handful follow from it.
const logLines = 12

// abortGrace is what CRIU gets to clean up after its victims were killed.
const abortGrace = 2 * time.Second

// dumpJob is a dump of a container, of which there is one at a time. It runs
// detached from the call that began it: a caller that goes away must not leave
// half a dump.
type dumpJob struct {
	cancel context.CancelCauseFunc
	// done is closed when the container is dead or has its signal; for a
	// reboot, when it is prepared or runs on. The rest is read after it.
	done   chan struct{}
	err    error          // of the final Kill; for a reboot, of the dump
	result control.Result // for a reboot
}

// newJob returns a job, the context of its life, which it cancels, and the time
// by which its dump must end: before the caller's deadline.
func (s *service) newJob(ctx context.Context) (job *dumpJob, life context.Context, deadline time.Time) {
	deadline = time.Now().Add(s.config.DumpTimeout)
	if d, ok := ctx.Deadline(); ok && d.Add(-s.config.CallerMargin).Before(deadline) {
		deadline = d.Add(-s.config.CallerMargin)
	}
	life = log.WithLogger(s.ctx, log.G(ctx))
	if ns, ok := namespaces.Namespace(ctx); ok { // otherwise the shim's own, which is the same
		life = namespaces.WithNamespace(life, ns)
	}
	life, cancel := context.WithCancelCause(life)
	return &dumpJob{cancel: cancel, done: make(chan struct{})}, life, deadline
}

// beginDump starts the dump that precedes the first stop signal. It returns nil
// where the signal is to be delivered without one, and first=false where a dump
// was begun earlier.
func (s *service) beginDump(ctx context.Context, c *container, r *taskAPI.KillRequest) (job *dumpJob, first bool) {
	if !c.optedIn || c.settings.Policy != checkpoint.PolicyResume {
		return nil, false
	}
	c.mu.Lock()
	job = c.dump
	started := !c.startedAt.IsZero()
	c.mu.Unlock()
	if job != nil || !started {
		return job, false
	}
	state, err := s.TTRPCTaskService.State(ctx, &taskAPI.StateRequest{ID: c.id})
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dump != nil {
		// Another Kill was faster. A signal that is delivered to the frozen
		// container would be dumped with it, and stop it once restored.
		return c.dump, false
	}
	if err != nil || state.Status != task.Status_RUNNING || c.busy != "" {
		return nil, false
	}
	job, life, deadline := s.newJob(ctx)
	c.busy, c.state, c.dump = opDump, state, job
	go func() {
		defer job.cancel(nil)
		defer close(job.done)
		ctx, cancel := context.WithDeadline(life, deadline)
		defer cancel()
		job.err = s.stop(ctx, c, r, int(state.Pid))
	}()
	return job, true
}

// abortDump ends a dump in progress in favour of SIGKILL and waits for its end.
func (s *service) abortDump(ctx context.Context, c *container) {
	c.mu.Lock()
	job, cg := c.dump, c.cgroup
	if c.prepare != nil {
		job = c.prepare
	}
	c.mu.Unlock()
	if job == nil || isClosed(job.done) {
		return
	}
	job.cancel(errAborted)
	if cg != nil {
		// CRIU gives up at once when its victims die.
		if err := errors.Join(cg.killAll(), cg.thaw()); err != nil {
			log.G(ctx).WithError(err).Debug("kill during dump")
		}
	}
	t := time.NewTimer(s.config.CleanupTimeout)
	defer t.Stop()
	select {
	case <-job.done:
	case <-ctx.Done():
	case <-t.C:
	}
}

// stop dumps, commits and kills; where that cannot be done it thaws and passes
// the signal on.
func (s *service) stop(ctx context.Context, c *container, r *taskAPI.KillRequest, pid int) error {
	_, err := s.dump(ctx, c, pid, dumpMode{})
	if err == nil {
		return s.killFrozen(ctx, c)
	}
	c.end()
	if errors.Is(err, errAborted) {
		return nil // whoever aborted delivers SIGKILL
	}
	// From here on nothing may be cancelled by the caller.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	return s.kill(ctx, r)
}

// killFrozen kills a container that was dumped, and ends its opDump. All
// processes die while they are still frozen: none may run on after its state
// was saved. It does not depend on the caller's staying.
func (s *service) killFrozen(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	c.killGroup(ctx)
	c.end()
	return s.kill(ctx, &taskAPI.KillRequest{ID: c.id, Signal: uint32(unix.SIGKILL)})
}

// killGroup kills all processes of a frozen container and thaws it. Version 1
// delivers no signal before the thaw. On version 2 the processes are gone before,
// and without it runc would find a container that is paused, for ever.
func (c *container) killGroup(ctx context.Context) {
	c.mu.Lock()
	cg := c.cgroup
	c.mu.Unlock()
	err := cg.killAll()
	if err == nil {
		err = thaw(cg)
	}
	if err != nil {
		log.G(ctx).WithField("container_id", c.id).WithError(err).Warn("kill frozen processes")
	}
}

func (s *service) kill(ctx context.Context, r *taskAPI.KillRequest) error {
	_, err := s.TTRPCTaskService.Kill(ctx, r)
	if err != nil && errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return nil // it died meanwhile, which is what was wanted
	}
	return err
}

// dumpMode says what a dump is for; zero is a stop.
type dumpMode struct {
	reboot   bool   // freeze at once, and stay frozen
	template string // make a version of this template, and run on
}

// reason is what the event of the dump says.
func (m dumpMode) reason() string {
	switch {
	case m.reboot:
		return rebootReason
	case m.template != "":
		return "template " + m.template
	}
	return ""
}

// dump is dumpAndCommit and the event that tells of it.
func (s *service) dump(ctx context.Context, c *container, pid int, mode dumpMode) (*checkpoint.Manifest, error) {
	start := time.Now()
	m, err := s.dumpAndCommit(ctx, c, pid, mode)
	e := event.Event{DurationMicros: time.Since(start).Microseconds(), Reason: mode.reason()}
	if err == nil {
		e.Type, e.CheckpointID, e.SizeBytes, e.Timings = event.Dumped, m.ID, m.Sizes.TotalBytes, &m.Timings
	} else {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		if e.Reason != "" {
			e.Reason += ": "
		}
		e.Type, e.ReasonCode = event.DumpFailed, reasonCode(err)
		e.Reason += err.Error()
	}
	s.event(ctx, c, e)
	return m, err
}

// dumpAndCommit leaves the container frozen with a committed checkpoint, or
// running and without one. For a reboot it freezes before it waits for a dump
// slot, so that the containers of a node stand still together. For a template
// it thaws before the commit: nothing is lost if that fails.
func (s *service) dumpAndCommit(ctx context.Context, c *container, pid int, mode dumpMode) (_ *checkpoint.Manifest, err error) {
	if err := c.waitFull(ctx); err != nil {
		return nil, err
	}
	cg, err := s.findGroup(pid, c.id)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.cgroup = cg
	c.mu.Unlock()
	st, err := s.openStore()
	if err != nil {
		return nil, err
	}
	if err := s.preflight(st, cg); err != nil {
		return nil, err
	}
	var stage *store.Stage
	var frozen time.Duration
	freeze := func() error {
		begin := time.Now()
		err := cg.freeze(ctx)
		if err == nil {
			err = cg.leaveVfork(ctx)
		}
		if err != nil {
			return fmt.Errorf("freeze: %w", err)
		}
		frozen = time.Since(begin)
		return nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, rollBack(cg, stage))
		}
	}()
	if mode.reboot {
		if err := freeze(); err != nil {
			return nil, err
		}
	}
	release, err := acquireSlot(ctx, s.config.RuntimeDir, s.config.DumpSlots)
	if err != nil {
		return nil, err
	}
	defer release()
	if mode.reboot {
		// Those that had the slots before may have filled the disk.
		if err := s.preflight(st, cg); err != nil {
			return nil, err
		}
	}
	m := s.newManifest(c)
	if mode.template != "" {
		m.Template = mode.template
		m.Settings.TCP = checkpoint.TCPClose // no clone has the source's address
	}
	if m.Lost, err = s.execs(ctx, c); err != nil {
		return nil, err
	}
	if stage, err = st.Stage(ctx, m.ID); err != nil {
		return nil, err
	}
	if err := c.writeCRIUConfig(s.dumpOptionsFor(m.Settings.TCP)); err != nil {
		return nil, err
	}
	if !mode.reboot {
		if err := freeze(); err != nil {
			return nil, err
		}
	}
	m.Timings.FreezeMicros = frozen.Microseconds()
	if m.Sizes.InUseBytes, err = cg.memoryBytes(); err != nil {
		return nil, fmt.Errorf("memory in use: %w", err)
	}
	if err := s.fill(ctx, c, stage, m); err != nil {
		return nil, err
	}
	if mode.template != "" {
		if err := thaw(cg); err != nil {
			return nil, err
		}
		took, err := layOutMapped(ctx, stage.Dir())
		if err != nil {
			return nil, err
		}
		m.Timings.CopyMicros += took.Microseconds()
	}
	if err := stage.Commit(ctx, m); err != nil {
		return nil, err
	}
	return m, nil
}

// rollBack thaws, whatever the state in which the failure left the container,
// and removes the stage, where there is one.
func rollBack(cg group, stage *store.Stage) error {
	if stage == nil {
		return thaw(cg)
	}
	// A CRIU that outlived its runc would freeze the container again at its
	// own end (criu/seize.c, freezer_restore_state).
	endProcessesIn(stage.Dir())
	return errors.Join(thaw(cg), stage.Abort())
}

// thaw tries several times: thawing twice is harmless, missing one is not.
func thaw(cg group) error {
	var err error
	for range 3 {
		if err = cg.thaw(); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("thaw: %w", err)
}

// endProcessesIn kills what still works in the directory and waits, within a
// second, until it is gone. Only CRIU changes its directory to a stage.
func endProcessesIn(dir string) {
	for range 50 {
		pids := processesIn(dir)
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL) // an error means that it is gone
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// waitProcessesIn waits, within five seconds, until nothing works in the directory.
func waitProcessesIn(ctx context.Context, dir string) {
	for range 100 {
		if ctx.Err() != nil || len(processesIn(dir)) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// processesIn lists the other processes whose current directory is dir or lies in it.
func processesIn(dir string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err == nil && (cwd == dir || strings.HasPrefix(cwd, dir+"/")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// preflight refuses what can be known to fail before anything is frozen.
func (s *service) preflight(st *store.Store, cg group) error {
	need, err := cg.memoryBytes()
	if err != nil {
		return fmt.Errorf("memory in use: %w", err)
	}
	free, err := st.FreeBytes()
	if err != nil {
		return err
	}
	if free < need+s.config.MinFreeBytes {
		return fmt.Errorf("%s has %d MiB free, the dump needs about %d MiB: %w",
			st.Root(), free>>20, (need+s.config.MinFreeBytes)>>20, checkpoint.ErrNoSpace)
	}
	return nil
}

// execs lists the exec processes of the container, which no checkpoint keeps.
func (s *service) execs(ctx context.Context, c *container) ([]string, error) {
	pids, err := s.TTRPCTaskService.Pids(ctx, &taskAPI.PidsRequest{ID: c.id})
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", errgrpc.ToNative(err))
	}
	var lost []string
	for _, p := range pids.Processes {
		if p.Info != nil {
			lost = append(lost, "exec process "+strconv.Itoa(int(p.Pid)))
		}
	}
	return lost, nil
}

func (s *service) newManifest(c *container) *checkpoint.Manifest {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	m := &checkpoint.Manifest{
		FormatVersion: checkpoint.FormatVersion,
		ID:            checkpoint.NewID(c.identity, now),
		Identity:      c.identity,
		CreatedAt:     now.UTC(),
		PodName:       c.annotations[checkpoint.CRISandboxName],
		PodUID:        c.annotations[checkpoint.CRISandboxUID],
		SandboxID:     c.annotations[checkpoint.CRISandboxID],
		ContainerID:   c.id,
		ImageName:     c.annotations[checkpoint.CRIImageName],
		ImageDigest:   c.annotations[checkpoint.InternalImageDigest],
		Settings:      c.settings,
		Fingerprint:   c.fingerprint,
		Generation:    1,
		UptimeMillis:  now.Sub(c.startedAt).Milliseconds(),
	}
	if f := c.restoredFrom; f != nil {
		m.Generation, m.RestoredFrom = f.Generation+1, f.ID
	}
	return m
}

// fill dumps the frozen container into the stage: processes, writable layer,
// memory-backed volumes, spec.
func (s *service) fill(ctx context.Context, c *container, stage *store.Stage, m *checkpoint.Manifest) error {
	var err error
	if m.Host, err = criu.ReadHostFacts(filepath.Join(s.config.RuntimeDir, hostFactsFile)); err != nil {
		return fmt.Errorf("host facts (is stasisd running?): %w", err)
	}
	if m.Hostname, err = hostnameOf(c.spec); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	begin := time.Now()
	if err := s.criuDump(ctx, c, stage.Dir(), m); err != nil {
		return err
	}
	m.Timings.CRIUMicros = time.Since(begin).Microseconds()

	begin = time.Now()
	if m.Sizes.LayerBytes, err = captureFile(ctx, filepath.Join(stage.Dir(), checkpoint.RootfsDiffFile), c.upper); err != nil {
		return fmt.Errorf("writable layer: %w", err)
	}
	volumes, err := memoryVolumes(c.spec)
	if err != nil {
		return err
	}
	if len(volumes) > 0 {
		if err := os.Mkdir(filepath.Join(stage.Dir(), checkpoint.VolumeDir), 0o700); err != nil {
			return err
		}
	}
	for i, v := range volumes {
		file := checkpoint.VolumeDir + "/" + strconv.Itoa(i) + ".layer"
		n, err := captureFile(ctx, filepath.Join(stage.Dir(), file), v.source)
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.destination, err)
		}
		m.Sizes.VolumeBytes += n
		m.Volumes = append(m.Volumes, checkpoint.Volume{Destination: v.destination, File: file})
	}
	spec, err := json.Marshal(c.spec)
	if err != nil {
		return fmt.Errorf("spec: %w", err)
	}
	if err := writeNew(filepath.Join(stage.Dir(), checkpoint.SpecFile), spec); err != nil {
		return err
	}
	m.Timings.CopyMicros = time.Since(begin).Microseconds()
	return nil
}

// hostFactsFile is written by the daemon into the runtime directory.
const hostFactsFile = "host.json"

// criuDump lets runc dump the container and leave it frozen.
func (s *service) criuDump(ctx context.Context, c *container, dir string, m *checkpoint.Manifest) error {
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	// A CRIU that is killed leaves its victims running, with its parasite in
	// them: only SIGKILL for the container may do that. Whoever's deadline
	// passes meanwhile gets the rollback when CRIU is done.
	uninterrupted, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.DumpTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		if !errors.Is(context.Cause(ctx), errAborted) {
			return
		}
		// CRIU gives up by itself when its victims die. It is left the time
		// to take away its rules that stop the traffic of the whole pod.
		select {
		case <-time.After(abortGrace):
			cancel()
		case <-uninterrupted.Done():
		}
	})()
	opts, err := typeurl.MarshalAnyToProto(&options.CheckpointOptions{
		OpenTcp:             m.Settings.TCP == checkpoint.TCPKeep,
		ExternalUnixSockets: true,
		Terminal:            c.request.Terminal,
		FileLocks:           true,
		WorkPath:            work,
	})
	if err != nil {
		return err
	}
	images := filepath.Join(dir, checkpoint.ImageDir)
	_, err = s.TTRPCTaskService.Checkpoint(uninterrupted, &taskAPI.CheckpointTaskRequest{ID: c.id, Path: images, Options: opts})
	if err != nil {
		lines, lerr := criu.LogErrors(filepath.Join(work, "dump.log"), logLines)
		if lerr != nil {
			log.G(ctx).WithError(lerr).Debug("no dump log")
		}
		return fmt.Errorf("dump: %w: %w: %s", errCRIU, errgrpc.ToNative(err), strings.Join(lines, " | "))
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("dump: %w", err)
	}
	if stats, err := criu.ReadDumpStats(work); err == nil {
		m.Timings.FrozenMicros = stats.Frozen.Microseconds()
	} else {
		log.G(ctx).WithError(err).Debug("no dump statistics")
	}
	if m.Sizes.MemoryBytes, err = dirBytes(images); err != nil {
		return err
	}
	// Keep the log and the statistics, under the names that checkpointctl knows.
	for _, name := range []string{checkpoint.DumpLogFile, "stats-dump"} {
		if err := os.Rename(filepath.Join(work, name), filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return os.RemoveAll(work)
}

// captureFile writes the tree under source as a layer file and returns its size.
func captureFile(ctx context.Context, name, source string) (int64, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := layer.Capture(ctx, f, source); err != nil {
		return 0, err
	}
	n, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	return n, f.Close()
}

func writeNew(name string, data []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func dirBytes(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var n int64
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			return 0, err
		}
		n += fi.Size()
	}
	return n, nil
}

// dumpOptions are CRIU's options for a dump of the container, be it ours or the
// CRI call's.
func (s *service) dumpOptions(c *container) criu.ConfigOptions {
	return s.dumpOptionsFor(c.settings.TCP)
}

func (s *service) dumpOptionsFor(tcp checkpoint.TCP) criu.ConfigOptions {
	o := criu.DumpOptions(tcp)
	if facts, err := criu.ReadHostFacts(filepath.Join(s.config.RuntimeDir, hostFactsFile)); err == nil {
		// Connections are not kept, so nothing needs the lock that stops all
		// traffic of the pod and costs a hundred milliseconds of iptables.
		o.SkipNetworkLock = o.TCPClose && criu.CanSkipNetworkLock(facts.CRIUVersion)
	}
	return o
}

// writeCRIUConfig replaces the content of the file whose path is fixed in
// runc's state for the container's life.
func (c *container) writeCRIUConfig(o criu.ConfigOptions) error {
	return os.WriteFile(filepath.Join(c.bundle, criuConfigFile), []byte(criu.Config(o)), 0o600)
}
