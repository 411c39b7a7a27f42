{-# OPTIONS --safe #-}
module Prelude where

infixr 4 _,_
infixr 3 _&_
infixr 2 _or_
infix 5 ~_

record _&_ (A B : Set) : Set where
  constructor _,_
  field
    fst : A
    snd : B

open _&_ public

data _or_ (A B : Set) : Set where
  inl : A -> A or B
  inr : B -> A or B

data False : Set where

~_ : Set -> Set
~ A = A -> False

either : {A B C : Set} -> (A -> C) -> (B -> C) -> A or B -> C
either f g (inl a) = f a
either f g (inr b) = g b

absurd : {A : Set} -> False -> A
absurd ()
