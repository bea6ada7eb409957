package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// Claim is the exclusive right of this process to restore a checkpoint. It ends
// with the first success of Release, Consume or Quarantine; after that these
// fail with [checkpoint.ErrNotFound]. A process that dies loses its claims.
// Its methods may be called concurrently.
type Claim struct {
	s        *Store
	id       checkpoint.ID
	dir      string
	manifest *checkpoint.Manifest

	mu    sync.Mutex // serialises the ends of the claim
	ended bool       // guarded by mu
}

// Claim takes a committed checkpoint away from all others, on behalf of the
// container. Errors: [checkpoint.ErrNotFound], [checkpoint.ErrBusy] if another
// process has it, a [CorruptError] if its manifest is damaged.
func (s *Store) Claim(ctx context.Context, id checkpoint.ID, containerID string) (*Claim, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	l, err := s.lock(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("claim checkpoint %s: %w", id, err)
	}
	defer l.Close()
	if _, err := s.releaseIfStale(ctx, id); err != nil {
		return nil, fmt.Errorf("claim checkpoint %s: %w", id, err)
	}
	m, err := s.readManifest(s.committedPath(id), id)
	if err != nil {
		return nil, err
	}
	c := &Claim{s: s, id: id, dir: s.claimedPath(id), manifest: m}
	err = s.mkdir(s.path(claimedDir, id.IdentityHash()))
	if err == nil {
		err = s.writeOwner(c.dir+ownerSuffix, containerID)
	}
	if err == nil {
		err = s.moveInto(s.committedPath(id), c.dir)
	}
	if err != nil {
		if there, lerr := s.exists(c.dir); lerr == nil && !there {
			s.dropOwner(id)
		}
		return nil, fmt.Errorf("claim checkpoint %s: %w", id, err)
	}
	return c, nil
}

// Dir is the absolute path of the checkpoint, as long as the claim lasts.
func (c *Claim) Dir() string { return c.dir }

// ID is the checkpoint's.
func (c *Claim) ID() checkpoint.ID { return c.id }

// Manifest is the checkpoint's, not to be changed.
func (c *Claim) Manifest() *checkpoint.Manifest { return c.manifest }

// Verify is like [Store.Verify], but for what is deferred.
func (c *Claim) Verify(ctx context.Context, deferred Deferred) error {
	return c.s.verify(ctx, c.dir, c.id, false, deferred)
}

// Release gives the checkpoint back unused.
func (c *Claim) Release(ctx context.Context) error {
	return c.end(ctx, "release", func() error { return c.s.release(c.id) })
}

// Consume removes the checkpoint, for good once it returns.
func (c *Claim) Consume(ctx context.Context) error {
	var trash string
	err := c.end(ctx, "consume", func() (err error) {
		if trash, err = c.s.trash(c.dir); err == nil {
			c.s.dropOwner(c.id)
		}
		return err
	})
	if err == nil {
		c.s.removeTrash(ctx, trash)
	}
	return err
}

// Quarantine is like [Store.Quarantine].
func (c *Claim) Quarantine(ctx context.Context, reason string, logs map[string][]byte) error {
	return c.end(ctx, "quarantine", func() error {
		err := c.s.quarantine(c.dir, c.id, reason, logs)
		if there, lerr := c.s.exists(c.dir); lerr == nil && !there {
			c.s.dropOwner(c.id)
		}
		return err
	})
}

func (c *Claim) end(ctx context.Context, op string, f func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := error(checkpoint.ErrNotFound)
	if !c.ended {
		err = c.endLocked(ctx, f)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", checkpoint.ErrNotFound, err)
	}
	if err != nil {
		return fmt.Errorf("%s checkpoint %s: %w", op, c.id, err)
	}
	c.ended = true
	return nil
}

func (c *Claim) endLocked(ctx context.Context, f func() error) error {
	l, err := c.s.lock(ctx, c.id)
	if err != nil {
		return err
	}
	defer l.Close()
	return f()
}
