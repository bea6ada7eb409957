package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// imagesDir is the directory of a bundle with the images of a restore.
const imagesDir = "images"

// createRestored claims the checkpoint and creates the container from it. It
// returns nil, nil where the container is to be started cold instead; the
// reason has been told.
func (s *service) createRestored(ctx context.Context, c *container, rawID string) (*taskAPI.CreateTaskResponse, error) {
	start := time.Now()
	defer collectLess()()
	id, err := checkpoint.ParseID(rawID)
	if err != nil {
		return nil, s.refuse(ctx, c, "", nil, err)
	}
	ctx = withFields(ctx, log.Fields{"checkpoint_id": id})
	st, err := s.openStore()
	if err != nil {
		return nil, s.refuse(ctx, c, id, nil, err)
	}
	claim, err := s.claim(ctx, st, c, id)
	if err != nil {
		return nil, s.refuse(ctx, c, id, nil, err)
	}
	id = claim.ID() // that of a template may be a newer one
	p := &pendingRestore{claim: claim, begun: start}
	p.phase("claim", time.Since(start))
	if err := s.prepareRestore(ctx, c, p); err != nil {
		return nil, s.refuse(ctx, c, id, p, err)
	}
	resp, err := s.createFrom(ctx, c, p)
	if err != nil {
		return nil, s.refuse(ctx, c, id, p, fmt.Errorf("create: %w", errgrpc.ToNative(err)))
	}
	c.mu.Lock()
	c.restore = p
	c.mu.Unlock()
	return resp, nil
}

// createFrom creates the inner object that Start will restore.
func (s *service) createFrom(ctx context.Context, c *container, p *pendingRestore) (*taskAPI.CreateTaskResponse, error) {
	begin := time.Now()
	defer func() { p.phase("create", time.Since(begin)) }()
	r := proto.CloneOf(c.request)
	r.Checkpoint = p.plan.ImageDir
	return s.TTRPCTaskService.Create(ctx, r)
}

// prepareRestore checks the claimed checkpoint against the container and lays
// out what CRIU expects to find. What it did is undone by cleanRestore.
func (s *service) prepareRestore(ctx context.Context, c *container, p *pendingRestore) error {
	begin := time.Now()
	facts, err := s.hostFacts(ctx)
	if err != nil {
		// What is wrong with this file is no fault of the checkpoint, which
		// must not be quarantined for it.
		return &restore.Refusal{Code: restore.Internal, Err: fmt.Errorf("host facts (is stasisd running?): %w", err)}
	}
	hostname, err := hostnameOf(c.spec)
	if err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	if entries, err := os.ReadDir(c.upper); err != nil {
		return fmt.Errorf("writable layer: %w", err)
	} else if len(entries) > 0 {
		return fmt.Errorf("the writable layer is in use: it holds %q: %w", entries[0].Name(), checkpoint.ErrInvalid)
	}
	p.fresh = true
	m := p.claim.Manifest()
	// The images of this restore are links to the claimed ones, except for the
	// few that are rewritten: the checkpoint stays as it was verified. They lie in the
	// bundle, which containerd removes if this shim dies, and on tmpfs, where a hundred
	// links take a millisecond and not ten.
	p.images = filepath.Join(c.bundle, imagesDir)
	r := restore.Request{
		Dir:      p.claim.Dir(),
		Manifest: m,
		Verify: func(ctx context.Context) error {
			begin := time.Now()
			defer func() { p.verify = time.Since(begin) }()
			return p.claim.Verify(ctx, p.deferred)
		},
		Identity:    c.identity,
		ImageDigest: c.annotations[checkpoint.InternalImageDigest],
		Spec:        c.spec,
		Fingerprint: c.fingerprint,
		Settings:    c.settings,
		Hostname:    hostname,
		Host:        facts,
		SwapBytes:   swapBytes(),
		CanMerge:    criu.CanMerge(),
		ImageDir:    p.images,
		TmpfsDir:    filepath.Join(c.bundle, tmpfsDir),
	}
	if m.Template != "" && c.settings.Merge && !r.CanMerge {
		log.G(ctx).WithField("reason", "the kernel was built without KSM").Warn("memory is not offered for merging")
	}
	// Only a restart in the same sandbox is the kubelet's answer to a
	// container that fails; a new sandbox is somebody's wish.
	if m.Template == "" && m.SandboxID == c.annotations[checkpoint.CRISandboxID] {
		r.MinUptime = s.config.MinUptime
	}
	p.eager = eagerBecause(m, c, facts.CRIUVersion)
	if c.settings.Memory == checkpoint.MemoryMapped {
		if err := s.mapMemory(c, p); err != nil {
			p.unmapped = err.Error()
			log.G(ctx).WithError(err).Warn("memory is not mapped")
		}
	}
	// A clone that is killed for damage found late is replaced by another; of a
	// container that goes on from its own checkpoint there is only one, and what
	// it did meanwhile is done.
	p.unverified = p.eager == "" && m.Template != ""
	if p.unverified { // else its checksums take longer than the pager's start
		s.startLazy(ctx, c, p)
	}
	r.Mapped = p.mapped
	p.request = r
	p.plan, err = restore.Prepare(ctx, r)
	if err != nil {
		return err
	}
	if p.mapped != nil && !p.checked {
		s.noteChecked(ctx, p.claim, p.record)
	}
	p.phase("verify", p.plan.VerifyWait)
	p.phase("prepare", time.Since(begin)-p.plan.VerifyWait)
	begin = time.Now()
	if err := s.applyLayers(ctx, c, p); err != nil {
		return err
	}
	p.phase("layers", time.Since(begin))
	if err := s.newGeneration(c); err != nil {
		return err
	}
	return c.writeCRIUConfig(p.plan.CRIU)
}

// swapBytes is the size of the node's swap space, 0 where that is not known.
func swapBytes() int64 {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return 0
	}
	return int64(i.Totalswap) * int64(i.Unit)
}

// hostFacts waits for the daemon to write them, for a while: soon after a boot
// CRIU may still be finding out what the kernel can do, and a cold start would
// waste the checkpoint.
func (s *service) hostFacts(ctx context.Context) (checkpoint.Host, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.FactsTimeout)
	defer cancel()
	for {
		facts, err := criu.ReadHostFacts(filepath.Join(s.config.RuntimeDir, hostFactsFile))
		if !errors.Is(err, checkpoint.ErrNotFound) {
			return facts, err
		}
		select {
		case <-ctx.Done():
			return facts, err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// applyLayers brings back the writable layer, before it is mounted, and the
// memory-backed volumes. A volume that another container of the pod already
// uses keeps what it holds.
func (s *service) applyLayers(ctx context.Context, c *container, p *pendingRestore) error {
	if p.plan.RootfsDiff != "" {
		// Nothing else lies there: cleanRestore empties it.
		if _, err := applyFile(ctx, p.plan.RootfsDiff, c.upper, layer.Options{AllowDevices: true}); err != nil {
			return fmt.Errorf("writable layer: %w", err)
		}
	}
	volumes, err := memoryVolumes(c.spec)
	if err != nil {
		return err
	}
	source := make(map[string]string, len(volumes))
	for _, v := range volumes {
		source[v.destination] = v.source
	}
	for _, v := range p.plan.Volumes {
		src, ok := source[v.Destination]
		if !ok {
			return fmt.Errorf("volume %s is no longer memory-backed: %w", v.Destination, checkpoint.ErrIncompatible)
		}
		applied, err := applyFile(ctx, v.File, src, layer.Options{SkipExisting: true})
		p.applied = append(p.applied, applied)
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.Destination, err)
		}
	}
	return nil
}

func applyFile(ctx context.Context, name, dir string, opt layer.Options) (layer.Applied, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return layer.Applied{}, err
	}
	defer f.Close()
	return layer.Apply(ctx, f, dir, opt)
}

// cleanRestore undoes what prepareRestore did to the pod, so that a cold start
// finds what it would have found without a checkpoint.
func (s *service) cleanRestore(ctx context.Context, c *container, p *pendingRestore) error {
	p.endStart(ctx)
	var errs []error
	for _, a := range p.applied {
		err := a.Undo()
		if p.ran && err != nil {
			// What a container has left in a volume its successor finds, as ever.
			log.G(ctx).WithError(err).Warn("what the restored container has changed stays")
			err = nil
		}
		errs = append(errs, err)
	}
	p.applied = nil
	if p.fresh {
		// runc adds mount points to the root file system before it restores.
		errs = append(errs, emptyDir(c.upper), emptyDir(c.work))
	}
	return errors.Join(append(errs, p.removeImages())...)
}

// removeImages removes what was laid out for CRIU.
func (p *pendingRestore) removeImages() error {
	if p.images == "" {
		return nil // nothing was
	}
	return os.RemoveAll(p.images)
}

// emptyDir removes what is in the directory. The overlay's work directory may
// hold a directory of mode 000 named work, which root removes all the same.
func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

// refuse tells why a checkpoint was not used and puts it where it belongs. It
// returns nil where the container is to be started cold, and the error that
// fails the start where the pod asked for that, or where the caller, whose
// context ctx is, has given it up and the checkpoint waits for the next start.
func (s *service) refuse(ctx context.Context, c *container, id checkpoint.ID, p *pendingRestore, err error) error {
	code := reasonCode(err)
	var refusal *restore.Refusal
	if errors.As(err, &refusal) {
		code = refusal.Code
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	givenUp := ctx.Err() != nil && (refusal == nil || code == restore.Aborted) && !errors.Is(err, errHook)
	var undone error
	if p != nil {
		undone = s.cleanRestore(cleanup, c, p)
		if quarantined := s.setAside(cleanup, c, p, code, err); quarantined {
			givenUp = false
		}
	}
	if undone != nil {
		// A cold start on a half restored file system would be worse than none.
		err = fmt.Errorf("%w; undo: %w", err, undone)
		s.event(cleanup, c, event.Event{Type: event.RestoreFail, CheckpointID: id, Reason: err.Error(), ReasonCode: code})
		return errgrpc.ToGRPC(fmt.Errorf("container %q: %w", c.id, err))
	}
	if givenUp {
		err = fmt.Errorf("the start was given up by its caller, and the checkpoint is kept: %w", err)
		s.event(cleanup, c, event.Event{Type: event.RestoreFail, CheckpointID: id, Reason: err.Error(), ReasonCode: restore.Aborted})
		return errgrpc.ToGRPC(fmt.Errorf("container %q: %w", c.id, err))
	}
	e := event.Event{Type: event.ColdStart, CheckpointID: id, Reason: err.Error(), ReasonCode: code}
	if c.settings.OnFailure == checkpoint.OnFailureFail {
		e.Type = event.RestoreFail
	}
	s.event(cleanup, c, e)
	if e.Type == event.RestoreFail {
		return errgrpc.ToGRPC(fmt.Errorf("container %q: checkpoint %s cannot be restored and %s is %q: %w",
			c.id, id, checkpoint.AnnotationOnFailure, checkpoint.OnFailureFail, err))
	}
	return nil
}

// setAside ends the claim of a checkpoint that was not restored. One that fits
// another spec is given back; one that is damaged, or that CRIU refused, would
// only fail again and is quarantined with the log. A template is for many
// containers, and quarantined only where it is damaged. It tells which it was.
func (s *service) setAside(ctx context.Context, c *container, p *pendingRestore, code string, reason error) (quarantined bool) {
	var err error
	fatal := code == "corrupt"
	switch code {
	case "incompatible", "crash-loop", "criu", "pager", "hook":
		fatal = p.claim.Manifest().Template == ""
	}
	switch {
	case fatal:
		logs := map[string][]byte{}
		if data, rerr := readTail(filepath.Join(c.bundle, "work", "restore.log"), 1<<20); rerr == nil {
			logs["restore.log"] = data
		}
		if err = p.claim.Quarantine(ctx, reason.Error(), logs); err == nil {
			s.event(ctx, c, event.Event{Type: event.Quarantined, CheckpointID: p.claim.ID(), Reason: reason.Error(), ReasonCode: code})
		}
	default:
		err = p.claim.Release(ctx)
	}
	if err != nil {
		log.G(ctx).WithError(err).Error("checkpoint stays claimed until the daemon sweeps")
	}
	return fatal
}

func readTail(name string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() > limit {
		if _, err := f.Seek(-limit, io.SeekEnd); err != nil {
			return nil, err
		}
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// startRestored lets runc restore and runs the hook, and starts the container
// cold where one of them fails and the pod does not ask for strictness.
func (s *service) startRestored(ctx context.Context, c *container, p *pendingRestore, r *taskAPI.StartRequest) (*taskAPI.StartResponse, error) {
	defer collectLess()()
	m := p.claim.Manifest()
	ctx = withFields(ctx, log.Fields{"checkpoint_id": m.ID})
	var outputs error // why they are not held
	if c.settings.AfterRestore != "" {
		defer c.beginExchange()()
		var release func()
		release, outputs = holdOutput(c.request)
		defer release()
	}
	begin := time.Now()
	lazy := s.beginLazy(ctx, c, p)
	if lazy != nil {
		p.phase("pager", time.Since(begin))
	}
	var resp *taskAPI.StartResponse
	var err error
	if lazy == nil {
		err = p.verifyAll(ctx)
	}
	release := func() {} // what CRIU inherits
	if err == nil && p.mapped != nil {
		release, err = c.giveMemory(p)
	}
	if begin = time.Now(); err == nil {
		err = c.mountTmpfs(p.plan)
		p.phase("tmpfs", time.Since(begin))
	}
	if begin = time.Now(); err == nil {
		stop := func() {}
		if lazy != nil {
			stop = lazy.watchStart(ctx, killContainer)
		}
		resp, err = s.startInner(ctx, c, r)
		stop()
	}
	release()
	var end func() // of an exchange
	again := err != nil && p.mapped != nil && ctx.Err() == nil
	if again {
		_, unfinished := c.restoredByCRIU()
		again = unfinished != nil
	}
	if again {
		p.phase("runc", time.Since(begin))
		begin = time.Now()
		if uerr := p.unmap(ctx, err); uerr != nil {
			err = errors.Join(err, uerr)
		} else {
			resp, end, err = s.restoreEagerly(ctx, c, p, r)
		}
		p.phase("eager", time.Since(begin))
	} else if err != nil && lazy != nil && !lazy.ran() && ctx.Err() == nil {
		p.eager = fmt.Sprintf("a restore with a pager failed: %v", err)
		log.G(ctx).WithField("reason", p.eager).Warn("restore without a pager")
		p.phase("runc", time.Since(begin))
		begin = time.Now()
		first := err
		if resp, end, err = s.restoreEagerly(ctx, c, p, r); err != nil && !errors.Is(err, errCRIU) {
			err = fmt.Errorf("%w; that was to make up for: %w", err, first)
		}
		lazy = nil
		p.phase("eager", time.Since(begin))
	} else {
		p.phaseRunc(ctx, c, time.Since(begin))
	}
	p.plan.Tmpfs = nil // a megabyte that nobody needs any more
	var cause error    // of a cold start
	if err == nil {
		cause = s.afterRestore(ctx, c, lazy, p)
	}
	// A caller that went away deletes what it has asked for: the container must
	// not take its checkpoint with it. Who goes away from here on must not leave
	// half of what follows.
	if err == nil && cause == nil && ctx.Err() != nil {
		cause = fmt.Errorf("restored too late: %w", ctx.Err())
	}
	caller := ctx
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	if err == nil && cause == nil {
		c.mu.Lock()
		c.restoredFrom, c.mapped = m, p.mapped != nil
		c.mu.Unlock()
		// The event comes first. A shim that dies between the two, and its
		// container with it, leaves a record to go on from once more; the other
		// way round it would leave a cold start that nobody explains.
		s.event(ctx, c, event.Event{
			Type: event.Restored, CheckpointID: m.ID, SizeBytes: m.Sizes.TotalBytes,
			DurationMicros: time.Since(p.begun).Microseconds(), Reason: p.restoredReason(),
			Phases:   p.phases,
			Volatile: m.Template != "", // a template is there as before
		})
		if lazy != nil {
			// Until memory is full processors are for filling it and for the tasks.
			done := collectLess()
			go func() {
				defer done()
				s.follow(ctx, c, lazy) // ends when memory is full or the container is dead
			}()
		} else {
			if p.mapped != nil {
				go s.prefetch(ctx, p) // ends within prefetchTimeout, or with the shim
			}
			if err := p.claim.Consume(ctx); err != nil {
				log.G(ctx).WithError(err).Error("consume checkpoint")
			}
			s.unmark(ctx, p)
		}
		if err := errors.Join(c.writeCRIUConfig(s.dumpOptions(c)), p.removeImages()); err != nil {
			log.G(ctx).WithError(err).Error("clean up after restore")
		}
		return resp, nil
	}
	p.ran = cause != nil
	if !p.ran {
		cause = fmt.Errorf("restore: %w", err)
		if caller.Err() != nil {
			// runc was killed with the call: that is no fault of the checkpoint.
			cause = fmt.Errorf("restore: %w: %v", caller.Err(), err)
			waitProcessesIn(ctx, filepath.Join(c.bundle, "work")) // CRIU takes back what it made
		}
	}

	if err = nil; end == nil {
		end = c.beginExchange()
		s.publisher.muteDelete(c.id)
		if p.ran {
			s.publisher.muteExit(c.id, resp.Pid)
			err = s.deleteStarted(ctx, c.id)
		} else {
			err = s.deleteUnstarted(ctx, c)
		}
		if err != nil {
			s.publisher.drop(c.id) // no event will come
		}
	}
	defer end()
	if lerr := s.abandonLazy(ctx, c); err != nil || lerr != nil {
		if errors.Is(cause, errHook) {
			s.setAside(ctx, c, p, reasonCode(cause), cause)
		} else {
			s.returnRestore(ctx, c, p, err)
		}
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %q: delete after failed restore: %w", c.id, errors.Join(cause, errgrpc.ToNative(err), lerr)))
	}
	if errors.Is(cause, errHook) && m.Template != "" && c.settings.OnFailure != checkpoint.OnFailureFail {
		s.rememberClone(c, m.ID, 0) // another restart in this sandbox need not try again
	}
	if err := s.refuse(caller, c, m.ID, p, cause); err != nil {
		return nil, err
	}
	if caller.Err() != nil {
		return nil, errgrpc.ToGRPC(cause) // nobody waits for a cold start
	}
	if p.ran {
		if err := noSuccessor(c, outputs); err != nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("container %q: %w; it starts cold the next time: %w", c.id, cause, err))
		}
	}
	if err := c.writeCRIUConfig(s.dumpOptions(c)); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if _, err := s.TTRPCTaskService.Create(caller, c.request); err != nil {
		return nil, err
	}
	return s.TTRPCTaskService.Start(caller, r)
}

// startInner starts the inner object, which restores, and takes back what CRIU was
// given for that.
func (s *service) startInner(ctx context.Context, c *container, r *taskAPI.StartRequest) (*taskAPI.StartResponse, error) {
	resp, err := s.TTRPCTaskService.Start(ctx, r)
	c.endTmpfs(ctx, false)
	if err == nil {
		return resp, nil
	}
	lines, lerr := criu.LogErrors(filepath.Join(c.bundle, "work", "restore.log"), logLines)
	if lerr != nil {
		log.G(ctx).WithError(lerr).Debug("no restore log")
	}
	return nil, fmt.Errorf("%w: %w: %s", errCRIU, errgrpc.ToNative(err), strings.Join(lines, " | "))
}

// restoredByCRIU is how long CRIU took for the restore. An error means that it was not
// through with it: else tasks may have run, though runc then failed.
func (c *container) restoredByCRIU() (time.Duration, error) {
	// containerd makes it a link to a directory that outlives the bundle.
	work, err := filepath.EvalSymlinks(filepath.Join(c.bundle, "work"))
	if err != nil {
		return 0, err
	}
	return criu.ReadRestoreTime(work)
}

// phaseRunc splits what runc took for a restore by what CRIU says of it.
func (p *pendingRestore) phaseRunc(ctx context.Context, c *container, took time.Duration) {
	own, err := c.restoredByCRIU()
	if err == nil {
		own = min(own, took)
		p.phase("criu", own)
		took -= own
	}
	if err != nil {
		log.G(ctx).WithError(err).Debug("no statistics of the restore")
	}
	p.phase("runc", took)
}

// restoredReason is what the event of the restore says.
func (p *pendingRestore) restoredReason() string {
	reason := dumpMode{template: p.claim.Manifest().Template}.reason()
	var parts []string
	if reason != "" {
		parts = append(parts, reason)
	}
	if p.unmapped != "" {
		parts = append(parts, "memory is not mapped: "+p.unmapped)
	}
	switch p.eager {
	case eagerMapped:
		parts = append(parts, fmt.Sprintf("%d MiB of memory are mapped from it", p.mapped.Bytes>>20))
	case "", eagerChosen, eagerSmall, eagerUnmapped:
	default:
		parts = append(parts, "memory was read before the start: "+p.eager)
	}
	if took := p.took("hook"); took > 0 {
		parts = append(parts, fmt.Sprintf("hook in %v", took.Round(time.Millisecond)))
	}
	return strings.Join(parts, "; ")
}

// deleteUnstarted removes the inner object of a restore that failed. Where runc
// failed after its processes ran, it does not delete them before they are dead.
func (s *service) deleteUnstarted(ctx context.Context, c *container) error {
	id := c.id
	// A runc that was killed, as with a caller that goes away, has left these; and
	// one that deletes removes every file that it finds below the first.
	if err := errors.Join(detach(c.bundle), unmountYards(ctx, c.bundle)); err != nil {
		return err
	}
	_, err := s.TTRPCTaskService.Delete(ctx, &taskAPI.DeleteRequest{ID: id})
	if err == nil || errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return err
	}
	if kerr := s.kill(ctx, &taskAPI.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true}); kerr != nil {
		err = errors.Join(err, kerr)
	}
	for range 20 {
		time.Sleep(50 * time.Millisecond)
		if _, again := s.TTRPCTaskService.Delete(ctx, &taskAPI.DeleteRequest{ID: id}); again == nil {
			return nil
		}
	}
	return err
}

// returnRestore leaves the claim to a later Delete, after one here failed. Where
// a Delete beside this call was faster no other will come.
func (s *service) returnRestore(ctx context.Context, c *container, p *pendingRestore, err error) {
	c.mu.Lock()
	c.restore = p
	c.mu.Unlock()
	if errdefs.IsNotFound(errgrpc.ToNative(err)) {
		s.abandonRestore(ctx, c)
	}
}

// killUnstarted kills a container that was created from a checkpoint and not
// started. It has no process yet, and whoever waits for its exit, as containerd
// does before it deletes a task, would wait forever: a cold container takes its
// place and is killed.
func (s *service) killUnstarted(ctx context.Context, c *container, p *pendingRestore, r *taskAPI.KillRequest) (*emptypb.Empty, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	end := c.beginExchange()
	defer end()
	s.publisher.muteDelete(c.id)
	if err := s.deleteUnstarted(ctx, c); err != nil {
		s.publisher.drop(c.id) // no event will come
		s.returnRestore(ctx, c, p, err)
		return nil, err
	}
	if err := errors.Join(s.cleanRestore(ctx, c, p), p.claim.Release(ctx), c.writeCRIUConfig(s.dumpOptions(c))); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %q: kill before start: %w", c.id, err))
	}
	if _, err := s.TTRPCTaskService.Create(ctx, c.request); err != nil {
		return nil, err
	}
	return s.TTRPCTaskService.Kill(ctx, r)
}

// abandonRestore gives back the claim of a container that was created from a
// checkpoint and deleted without a start.
func (s *service) abandonRestore(ctx context.Context, c *container) {
	p := c.takeRestore()
	if p == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	if err := errors.Join(s.cleanRestore(ctx, c, p), p.claim.Release(ctx)); err != nil {
		log.G(ctx).WithError(err).Error("give back checkpoint")
	}
}
